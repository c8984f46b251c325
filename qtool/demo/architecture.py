"""The demo architecture: Qwen3-VL in miniature, as its config.json says it.

Rule: every field of the real checkpoints' config is here; only the sizes are small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.demo.tokenizer import VOCABULARY

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import Qwen3VLForConditionalGeneration

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
