"""Full-size checkpoints of random weights: they carry size and speed, no meaning."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from qtool.arch.detect import architecture_of
from qtool.storage.shards import OutputTensor, ShardLayout, lay_out
from tests.bench.vocabulary import write_tokenizer

_VISION = {
    "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17], "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
_TEXT = {
    "head_dim": 128, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}  # fmt: skip
SHAPES = {
    "2B": {"num_hidden_layers": 28, "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16},
    "8B": {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32},
}
"""The language halves of Qwen3-VL-Reranker-2B and -8B."""

_SHARD_BYTES = 5 << 30


def config_of(shape: str) -> dict[str, object]:
    """config.json of a model of this shape (2B is tied, 8B is not, as the real ones)."""
    text = {**_TEXT, **SHAPES[shape]}
    vision = {**_VISION, "out_hidden_size": text["hidden_size"]}
    if shape == "8B":
        vision |= {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "bfloat16",
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "tie_word_embeddings": shape == "2B", "text_config": {**text, "model_type": "qwen3_vl_text"},
        "vision_config": {**vision, "model_type": "qwen3_vl_vision"},
    }  # fmt: skip


def make_headers(folder: Path, shape: str) -> ShardLayout:
    """Write a checkpoint whose weights are all holes."""
    folder.mkdir(parents=True)
    ids, config = write_tokenizer(folder), config_of(shape)
    for name, token in (("image_token_id", "image_pad"), ("video_token_id", "video_pad"),
                        ("vision_start_token_id", "vision_start"), ("vision_end_token_id", "vision_end")):  # fmt: skip
        config[name] = ids[f"<|{token}|>"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    specs = [s for s in architecture_of(config).tensors(config) if shape != "2B" or s.hf_name != "lm_head.weight"]
    tensors = [OutputTensor(s.hf_name, "BF16", s.shape, 2 * int(np.prod(s.shape))) for s in specs]
    layout = lay_out(tensors, _SHARD_BYTES)
    for shard in layout.shards:
        (folder / shard.file_name).write_bytes(shard.header)
        os.truncate(folder / shard.file_name, shard.nbytes)
    if layout.index:
        (folder / "model.safetensors.index.json").write_bytes(layout.index)
    return layout


def make_checkpoint(folder: Path, shape: str) -> None:
    """Write a checkpoint of random BF16 weights (a 32 MiB sample of a normal distribution, repeated)."""
    layout = make_headers(folder, shape)
    sample = (np.random.default_rng(0).standard_normal(1 << 24, np.float32) * 0.02).view(np.uint32) >> 16
    block = memoryview(sample.astype("<u2").tobytes())
    for shard in layout.shards:
        with (folder / shard.file_name).open("r+b") as file:
            file.seek(len(shard.header))
            left = shard.nbytes - len(shard.header)
            while left:
                left -= file.write(block[: min(left, len(block))])
