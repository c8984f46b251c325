"""The files beside the weights: tokenizer, processors, chat templates, sentence-transformers modules.

Rule: the names, fields and values of the official repositories, with this tokenizer's ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qtool.arch.prompts import NO, VL_EMBEDDER, VL_RERANKER, YES
from qtool.arch.rerank_template import rerank_template
from qtool.demo.architecture import HIDDEN, model_config
from qtool.demo.tokenizer import SPECIAL_TOKENS
from qtool.inputs.limits import OFFICIAL_LIMITS

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
