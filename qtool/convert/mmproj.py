"""The metadata of a vision projector's GGUF file.

Rule: as llama.cpp's own converter writes it; its program clip.cpp reads no other names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from gguf.constants import VisionProjectorType

from qtool.arch.spec import Config, dimension, section
from qtool.errors import ModelError
from qtool.gguf_file.values import Kind, Value, array, boolean, float32, string, uint32
from qtool.jsonfile import read_json

ARCHITECTURE: Final = "clip"
_PREPROCESSORS: Final = ("processor_config.json", "preprocessor_config.json")


def vision_metadata(config: Config, directory: Path) -> dict[str, Value]:
    """The `clip.*` fields for config.json `config` and the image processor's files in `directory`."""
    vision, text = section(config, "vision_config"), section(config, "text_config")
    if dimension(vision, "temporal_patch_size", 2) != 2:
        raise ModelError("config.json: temporal_patch_size is not 2; llama.cpp adds up two frames.")
    patch, positions = dimension(vision, "patch_size", 16), dimension(vision, "num_position_embeddings")
    depth = dimension(vision, "depth")
    deepstack = set(vision.get("deepstack_visual_indexes", ()))
    mean, spread = (_statistics(directory, name) for name in ("image_mean", "image_std"))
    vision_fields = {
        "projection_dim": uint32(dimension(text, "hidden_size")),
        "image_size": uint32(int(positions**0.5 * patch)),
        "patch_size": uint32(patch),
        "embedding_length": uint32(dimension(vision, "hidden_size")),
        "feed_forward_length": uint32(dimension(vision, "intermediate_size")),
        "block_count": uint32(depth),
        "attention.head_count": uint32(dimension(vision, "num_heads")),
        "image_mean": array(Kind.FLOAT32, mean),
        "image_std": array(Kind.FLOAT32, spread),
        "spatial_merge_size": uint32(dimension(vision, "spatial_merge_size", 2)),
        "attention.layer_norm_epsilon": float32(text.get("rms_norm_eps", 1e-6)),
        "is_deepstack_layers": array(Kind.BOOL, [layer in deepstack for layer in range(depth)]),
    }
    return {
        "clip.has_vision_encoder": boolean(True),
        "clip.projector_type": string(VisionProjectorType.QWEN3VL),
        "clip.use_gelu": boolean(True),
        **{f"clip.vision.{key}": value for key, value in vision_fields.items()},
    }


def _statistics(directory: Path, name: str) -> list[float]:
    """Mean or spread of the pixel values, from whichever file declares it."""
    for file_name in _PREPROCESSORS:
        if (directory / file_name).is_file():
            declared: Any = read_json(directory / file_name)
            values = declared.get("image_processor", declared).get(name)
            if isinstance(values, list) and len(values) == 3:
                return [float32(value).data for value in values]
    raise ModelError(
        f"{directory} declares no {name}.", "preprocessor_config.json is missing; fetch the whole repository."
    )
