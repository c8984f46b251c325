"""Small checkpoints of random weights, written with the safetensors library itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from qtool.arch.detect import architecture_of
from qtool.arch.spec import Presence

TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 512,
    "attention_bias": False, "pad_token_id": 0,
}  # fmt: skip
ODD: dict[str, Any] = {
    **TEXT, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
"""Three rows of blocks here, five there: nothing is a power of two."""

VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl_vision",
}  # fmt: skip

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_CONFIG_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def text_config(
    text: Mapping[str, Any] = TEXT, *, tied: bool = False, architecture: str = "Qwen3ForCausalLM", **more: Any
) -> dict[str, Any]:
    """config.json of a text model."""
    return {
        "architectures": [architecture], "model_type": "qwen3", "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **text, **more,
    }  # fmt: skip


def vl_config(
    text: Mapping[str, Any] = TEXT, *, tied: bool = True, architecture: str = "Qwen3VLForConditionalGeneration"
) -> dict[str, Any]:
    """config.json of a VL model."""
    quarter = text["head_dim"] // 2 // 4
    sections = [text["head_dim"] // 2 - 2 * quarter, quarter, quarter]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
    return {
        "architectures": [architecture], "model_type": "qwen3_vl", "tie_word_embeddings": tied,
        "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
        "text_config": {**text, "rope_parameters": rope, "model_type": "qwen3_vl_text"},
        "vision_config": {**VISION, "out_hidden_size": text["hidden_size"]},
    }  # fmt: skip


def random_tensors(config: Mapping[str, Any], dtype: str = "BF16", seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the architecture, normally distributed, with a different spread each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, spec in enumerate(architecture_of(config).tensors(config)):
        if spec.presence is not Presence.DUPLICATE:
            spread = 0.02 * 1.1 ** (index % 20)
            tensors[spec.hf_name] = (torch.randn(spec.shape, generator=generator) * spread).to(TORCH[dtype])
    return tensors


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    dtype: str = "BF16",
    change: Callable[[dict[str, torch.Tensor]], object] | None = None,
    shards: int = 1,
) -> Path:
    """Write a checkpoint whose tensors `change` may alter first; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config, dtype)
    if change:
        change(tensors)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": _CONFIG_DTYPE[dtype]}, indent=2))
    (folder / "tokenizer.json").write_text('{"made": "for a test"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for shard, part in enumerate(np.array_split(names, shards), start=1):
        file_name = f"model-{shard:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part.tolist()}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part.tolist(), file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_bytes_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint as (dtype, shape, bytes), read with the safetensors library."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found
