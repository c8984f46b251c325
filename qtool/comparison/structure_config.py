"""What a model computes, as its config.json declares it, against the reference's.

Rule: fields are compared by what engines make of them, defaults filled in, since transformers 4 and 5 write the same
config otherwise. What no score depends on is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qtool.arch.detect import Detection
from qtool.arch.spec import section
from qtool.comparison.catalogue import finding
from qtool.convert.metadata import decoder_metadata
from qtool.inspection.finding import Finding

Facts = Mapping[str, Any]

_CODES: Final = {
    "rope.freq_base": "other-rope",
    "rope.dimension_sections": "other-rope",
    "mrope_interleaved": "other-rope",
    "attention.layer_norm_rms_epsilon": "other-epsilon",
    "n_deepstack_layers": "other-deepstack",
    "is_deepstack_layers": "other-deepstack",
    "vision.deepstack_visual_indexes": "other-deepstack",
    "context_length": "other-length",
    "tie_word_embeddings": "other-tying",
    "hidden_act": "other-config",
    "vision.hidden_act": "other-config",
    "attention_bias": "other-config",
    "use_sliding_window": "other-config",
}
"""By field; sizes are not listed."""

_TOKEN_IDS: Final = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_VISION: Final[Mapping[str, Any]] = {
    "depth": None, "hidden_size": None, "intermediate_size": None, "num_heads": None, "out_hidden_size": None,
    "num_position_embeddings": None, "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "deepstack_visual_indexes": [], "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
"""The vision tower's fields and transformers' defaults."""


def config_facts(detection: Detection) -> Facts:
    """Everything in config.json that a score depends on."""
    config, is_vision = detection.config, detection.architecture.is_vision
    text = section(config, "text_config") if is_vision else config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    facts = {key.removeprefix("."): value.data for key, value in decoder_metadata("", text).items()}
    facts |= {
        "hidden_act": text.get("hidden_act", "silu"),
        "attention_bias": bool(text.get("attention_bias")),
        "use_sliding_window": bool(text.get("use_sliding_window")),
        "vocab_size": text.get("vocab_size"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    }
    return facts | _vision_facts(config, rope) if is_vision else facts


def _vision_facts(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    vision = section(config, "vision_config")
    return {
        "mrope_interleaved": bool(rope.get("mrope_interleaved", True)),
        **{f"vision.{field}": vision.get(field, default) for field, default in _VISION.items()},
        **{field: config.get(field) for field in _TOKEN_IDS},
    }


def fact_findings(target: object, found: Facts, expected: Facts) -> Iterator[Finding]:
    """Each field in which the artefact differs; fields that the reference lacks do not count."""
    for field, value in expected.items():
        if found.get(field) != value:
            yield finding(_code_of(field), target, field=field, found=_shown(found.get(field)), expected=_shown(value))


def _code_of(field: str) -> str:
    return "other-token-ids" if field in _TOKEN_IDS else _CODES.get(field, "other-size")


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value:,g}" if isinstance(value, float) else str(value)
