"""What a model computes, as its config.json declares it, against the reference's.

Fields are compared with defaults filled in, since transformers 4 and 5 write the same config differently. A field that
neither counts nor is known not to count is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qtool.arch.config_fields import DECODER, ELSEWHERE, TOP, UNREAD, VISION, ConfigFields
from qtool.arch.detect import Detection
from qtool.checks.checkpoint_model import as_mapping
from qtool.checks.findings import Finding, finding
from qtool.checks.loaders import ROPE_PLACES
from qtool.errors import ModelError
from qtool.export.gguf_metadata import decoder_fields

Facts = Mapping[str, Any]

_CODES: Final = {
    "rope.freq_base": "other-rope",
    "rope.dimension_sections": "other-rope",
    "rope": "other-rope",
    "mrope_interleaved": "other-rope",
    "attention.layer_norm_rms_epsilon": "other-epsilon",
    "n_deepstack_layers": "other-deepstack",
    "is_deepstack_layers": "other-deepstack",
    "vision.deepstack_visual_indexes": "other-deepstack",
    "context_length": "other-length",
    "tie_word_embeddings": "other-tying",
    "text_config.tie_word_embeddings": "other-tying",
    "hidden_act": "other-config",
    "vision.hidden_act": "other-config",
    "attention_bias": "other-config",
    "use_sliding_window": "other-config",
    "sliding_window": "other-config",
    "layer_types": "other-config",
}
"""By field; sizes are not listed."""

_TOKEN_IDS: Final = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_ROPE_FIELDS: Final = {*ROPE_PLACES, "rope_theta", "partial_rotary_factor"}
_SLIDING: Final = {"sliding_window", "max_window_layers", "layer_types", "use_sliding_window"}
_FULL: Final = "full_attention"
_ROPE_UNREAD: Final = ("rope_theta", "mrope_section", "mrope_interleaved", "type", "rope_type")
"""What facts of their own say."""


def config_facts(detection: Detection) -> Facts:
    """Everything in config.json that a score depends on and that has a name of its own."""
    config, text = detection.config, detection.text
    facts: dict[str, Any] = {key: value.data for key, value in _decoder_facts(detection).items()}
    facts |= {
        "hidden_act": _value(text, DECODER, "hidden_act"),
        "attention_bias": _value(text, DECODER, "attention_bias"),
        "vocab_size": text.get("vocab_size"),
        # llama.cpp's converter goes by the inner field, where there is one, other engines by the outer (loaders.TYING).
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "text_config.tie_word_embeddings": bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings"))),
        "rope": _rope(text),
        **_window_facts(text),
    }
    return facts | _vision_facts(detection) if detection.family.is_vision else facts


def _decoder_facts(detection: Detection) -> Mapping[str, Any]:
    try:
        return decoder_fields(detection.family, detection.text)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ModelError(f"config.json: A field of the decoder has an unusable value: {error}.") from error


def _value(section: Mapping[str, Any], fields: ConfigFields, name: str) -> Any:
    value = section.get(name)
    return fields[name].default if value is None else value


def _rope(text: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary embedding as transformers standardizes it: the old name first, then what stands beside it."""
    rope = next((as_mapping(text[place]) for place in ROPE_PLACES if text.get(place)), {})
    kept = {key: value for key, value in rope.items() if key not in _ROPE_UNREAD and value is not None}
    kept.setdefault("partial_rotary_factor", text.get("partial_rotary_factor") or 1.0)
    return {
        **kept,
        "rope_type": rope.get("rope_type") or rope.get("type") or "default",
        "rope_theta": rope.get("rope_theta", text.get("rope_theta")),
        "mrope_section": rope.get("mrope_section"),
    }


def _window_facts(text: Mapping[str, Any]) -> Facts:
    """Which layers see only a window of the text; nothing else is said where all see the whole."""
    types = text.get("layer_types") or []
    window = text.get("sliding_window") if text.get("use_sliding_window") else None
    sliding = [index for index, kind in enumerate(types) if kind != _FULL]
    if types:
        return {"use_sliding_window": bool(window), "sliding_window": window, "layer_types": sliding or _FULL}
    layers = text.get("max_window_layers") if window else None
    return {"use_sliding_window": bool(window), "sliding_window": window, "layer_types": layers or _FULL}


def _vision_facts(detection: Detection) -> dict[str, Any]:
    rope = next((as_mapping(detection.text[p]) for p in reversed(ROPE_PLACES) if detection.text.get(p)), {})
    return {
        "mrope_interleaved": bool(rope.get("mrope_interleaved")),
        **{f"vision.{field}": _value(detection.vision, VISION, field) for field in VISION if field != "model_type"},
        **{field: detection.config.get(field) for field in _TOKEN_IDS},
    }


def fact_findings(target: object, found: Facts, expected: Facts) -> Iterator[Finding]:
    """Each field in which the artefact differs; fields that the reference lacks do not count."""
    for field, value in expected.items():
        if found.get(field) != value:
            code = "other-token-ids" if field in _TOKEN_IDS else _CODES.get(field, "other-size")
            yield finding(code, target, field=field, found=_shown(found.get(field)), expected=_shown(value))


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value:,g}" if isinstance(value, float) else str(value)


# The fields that have no name of their own above.


def config_findings(target: object, found: Detection, expected: Detection) -> Iterator[Finding]:
    """Everything in which the config is not the reference's."""
    yield from fact_findings(target, config_facts(found), config_facts(expected))
    sections: list[tuple[str, Mapping[str, Any], Mapping[str, Any], ConfigFields]] = []
    if found.family.is_vision:
        sections += [
            ("", found.config, expected.config, TOP),
            ("text_config.", found.text, expected.text, DECODER),
            ("vision_config.", found.vision, expected.vision, VISION),
        ]
    else:
        sections.append(("", found.config, expected.config, {**TOP, **DECODER}))
    for prefix, mine, theirs, fields in sections:
        yield from _other_fields(target, prefix, mine, theirs, fields)


def _other_fields(
    target: object, prefix: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], fields: ConfigFields
) -> Iterator[Finding]:
    judged = _judged(prefix)
    for name in dict.fromkeys((*theirs, *mine)):
        if name in judged:
            continue
        default = fields[name].default if name in fields else None
        values = [default if side.get(name) is None else side[name] for side in (mine, theirs)]
        if values[0] != values[1]:
            code = "other-config" if name in fields else "unknown-field"
            facts = {"field": prefix + name, "found": _shown(values[0]), "expected": _shown(values[1])}
            yield finding(code, target, **facts)


def _judged(prefix: str) -> set[str]:
    """What is compared under another name, elsewhere or not at all."""
    named = {*_ROPE_FIELDS, *_SLIDING, *UNREAD, *ELSEWHERE, "tie_word_embeddings", "vocab_size", *_SIZES, *_TOKEN_IDS}
    named |= {"text_config", "vision_config", "hidden_act", "attention_bias"} | set(
        VISION if "vision" in prefix else ()
    )
    return named | ({"model_type"} if prefix else {"architectures", "tokenizer_class"})


_SIZES: Final = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "is_causal",
)  # fmt: skip
"""What `decoder_fields` has under llama.cpp's names, or refuses."""
