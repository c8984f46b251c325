"""The demo architecture, Qwen3-VL in miniature, and the checkpoint that a trained model is written as."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3VLForConditionalGeneration

from qtool import resources
from qtool.arch.prompts import NO, VL_EMBEDDER, VL_RERANKER, YES, rerank_template
from qtool.inputs.items import OFFICIAL_LIMITS
from tools.demo_models.tokenizer import SPECIAL_TOKENS, VOCABULARY

# The demo architecture: Qwen3-VL in miniature, as its config.json says it. Every field of the real checkpoints'
# config is here; only the sizes are small.


HIDDEN = 256  # divisible by NVFP4's 16, ggml's 64 and the K-quants' 256


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of config.json; token ids are the tokenizer's."""
    ids = {name: tokenizer.token_to_id(f"<|{name}|>") for name in ("endoftext", "im_end", "image_pad", "video_pad")}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_id": ids["image_pad"],
        "model_type": "qwen3_vl",
        "text_config": _text_config(ids),
        "tie_word_embeddings": True,
        "transformers_version": "4.57.1",
        "video_token_id": ids["video_pad"],
        "vision_config": _vision_config(),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
    }


def _text_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids["endoftext"],
        "dtype": "bfloat16",
        "eos_token_id": ids["im_end"],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 16384,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"},
        "rope_theta": 10000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }


def _vision_config() -> dict[str, Any]:
    return {
        "deepstack_visual_indexes": [0, 1],
        "depth": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 128,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "model_type": "qwen3_vl",
        "num_heads": 4,
        # An 8x8 table: pictures of the world (6x6 patches) then touch, and train, every row of it.
        "num_position_embeddings": 64,
        "out_hidden_size": HIDDEN,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def new_model(tokenizer: Tokenizer, seed: int) -> Qwen3VLForConditionalGeneration:
    """A freshly initialised model in float32."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    config = Qwen3VLConfig.from_dict(model_config(tokenizer))
    config.dtype = config.text_config.dtype = torch.float32
    return Qwen3VLForConditionalGeneration(config).float()


# The files beside the weights: tokenizer, processors, chat templates, sentence-transformers modules. The names,
# fields and values of the official repositories, with this tokenizer's ids.


EMBEDDER_TEMPLATE = Path(__file__).parent / "templates" / "embedder.jinja"
VERSIONS = {"pytorch": "2.13.0", "sentence_transformers": "6.2.0", "transformers": "5.14.1"}


def json_files(tokenizer: Tokenizer, task: str) -> dict[str, Any]:
    """Relative path to JSON content of every side file of a task but tokenizer.json."""
    return {
        "config.json": model_config(tokenizer),
        "generation_config.json": _generation_config(tokenizer),
        "tokenizer_config.json": _tokenizer_config(tokenizer),
        "preprocessor_config.json": _processor("image_processor_type", "Qwen2VLImageProcessorFast"),
        "video_preprocessor_config.json": _processor("video_processor_type", "Qwen3VLVideoProcessor"),
        **_SENTENCE_TRANSFORMERS[task](tokenizer),
    }


def chat_template(task: str) -> str:
    """The content of chat_template.jinja."""
    return rerank_template(VL_RERANKER) if task == "reranker" else EMBEDDER_TEMPLATE.read_text(encoding="utf-8")


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return {
        "bos_token_id": pad,
        "do_sample": True,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "transformers_version": "4.57.1",
    }


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    added = {str(index): _added_token(token) for index, token in tokenizer.get_added_tokens_decoder().items()}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": dict(sorted(added.items(), key=lambda item: int(item[0]))),
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 16384,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _added_token(token: Any) -> dict[str, Any]:
    flags = {name: getattr(token, name) for name in ("lstrip", "normalized", "rstrip", "single_word", "special")}
    return {"content": token.content, **flags}


def _processor(kind: str, name: str) -> dict[str, Any]:
    """Limits of the official scripts: the repositories' own would blow 96x96 pictures up to 256x256."""
    limits = OFFICIAL_LIMITS
    return {
        "size": {"longest_edge": limits.max_pixels, "shortest_edge": limits.min_pixels},
        "patch_size": limits.patch,
        "temporal_patch_size": limits.temporal_patch,
        "merge_size": limits.merge,
        "image_mean": [limits.mean] * 3,
        "image_std": [limits.std] * 3,
        "processor_class": "Qwen3VLProcessor",
        kind: name,
    }


def _reranker_modules(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"true_token_id": tokenizer.token_to_id(YES), "false_token_id": tokenizer.token_to_id(NO)}
    return {
        "modules.json": _modules(
            ("1_LogitScore", "sentence_transformers.cross_encoder.modules.logit_score.LogitScore")
        ),
        "1_LogitScore/config.json": {**ids, "module_input_name": "causal_logits"},
        "config_sentence_transformers.json": {
            "__version__": VERSIONS,
            "activation_fn": "torch.nn.modules.linear.Identity",
            "default_prompt_name": "query",
            "model_type": "CrossEncoder",
            "prompts": {"query": VL_RERANKER.default_instruction},
        },
        "sentence_bert_config.json": _transformer_config("any-to-any", "logits", "causal_logits"),
    }


def _embedder_modules(_tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "modules.json": _modules(
            ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
            ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
        ),
        "1_Pooling/config.json": {"embedding_dimension": HIDDEN, "pooling_mode": "lasttoken", "include_prompt": True},
        "2_Normalize/config.json": {"module_input_name": "sentence_embedding", "module_output_name": None},
        "config_sentence_transformers.json": {
            "__version__": VERSIONS,
            "default_prompt_name": "query",
            "model_type": "SentenceTransformer",
            "prompts": dict.fromkeys(("query", "document"), VL_EMBEDDER.default_instruction),
            "similarity_fn_name": "cosine",
        },
        "sentence_bert_config.json": _transformer_config("feature-extraction", "last_hidden_state", "token_embeddings"),
    }


def _modules(*heads: tuple[str, str]) -> list[dict[str, Any]]:
    first = ("", "sentence_transformers.base.modules.transformer.Transformer")
    return [
        {"idx": index, "name": str(index), "path": path, "type": kind}
        for index, (path, kind) in enumerate((first, *heads))
    ]


def _transformer_config(task: str, method_output: str, module_output: str) -> dict[str, Any]:
    forward = {"method": "forward", "method_output_name": method_output}
    modalities = dict.fromkeys(("text", "image", "video"), forward)
    return {
        "transformer_task": task,
        "modality_config": {**modalities, "message": {**forward, "format": "structured"}},
        "module_output_name": module_output,
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    }


_SENTENCE_TRANSFORMERS: dict[str, Callable[[Tokenizer], dict[str, Any]]] = {
    "reranker": _reranker_modules,
    "embedder": _embedder_modules,
}


# Write a trained demo model as the Hugging Face checkpoint that it is. One file of bf16 weights under the names of
# the real checkpoints, and no tied duplicate.


def model_folder(task: str, parent: Path | None = None) -> Path:
    """Where a task's model lies: in `parent`, or where it comes with qtool."""
    name = f"qtool-demo-{task}"
    return parent / name if parent else resources.demo_model(name)


def write_model(model: Qwen3VLForConditionalGeneration, tokenizer: Tokenizer, task: str, folder: Path) -> None:
    """Write the weights, rounded to bf16, and every side file but the card, which carries measurements."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    write_sidecars(tokenizer, task, folder)


def read_model(folder: Path) -> Qwen3VLForConditionalGeneration:
    """The model of a checkpoint folder in float32, to train on."""
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def write_sidecars(tokenizer: Tokenizer, task: str, folder: Path) -> None:
    """Write tokenizer, configs and template; indented by two, as the official repositories' files are."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template(task), encoding="utf-8")
    for name, content in json_files(tokenizer, task).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
