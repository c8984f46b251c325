"""Side files brought to the form in which they can be compared: what two spellings have in common for every engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from qtool.arch.config_fields import IMAGE_PROCESSOR, VIDEO_PROCESSOR
from qtool.checks.checkpoint_model import as_mapping
from qtool.checks.loaders import (
    CHAT_TEMPLATE,
    IMAGE_PROCESSOR_FILE,
    SEQUENCE_CONFIG,
    TYING,
    VIDEO_PROCESSOR_FILE,
    Thing,
)

_UNREAD_BY_PROCESSORS: Final = (
    "processor_class",
    "_processor_class",
    "auto_map",
    "data_format",
    "device",
    "input_data_format",
)
_TYPES: Final = ("image_processor_type", "video_processor_type", "feature_extractor_type")
_SUFFIXES: Final = ("Fast", "Pil")


def agree(thing: Thing, first: Any, second: Any) -> bool:
    """Whether engines take the same from both values of `thing`, whatever version of transformers wrote them."""
    forms = [_FORMS[thing.name](value) for value in (first, second)]
    if not all(isinstance(each, Mapping) and each.get("type") for each in forms):
        forms = [
            {k: v for k, v in each.items() if k != "type"} if isinstance(each, Mapping) else each for each in forms
        ]
    return bool(forms[0] == forms[1])


def template_text(text: str) -> str:
    """A chat template as Jinja reads it: it drops one line end at the end and knows only one kind of line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def _template(value: Any) -> Any:
    """One template, or several by name; tokenizer_config.json may list them."""
    if isinstance(value, str):
        return template_text(value)
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        value = {str(each.get("name")): each.get("template") for each in value}
    if isinstance(value, Mapping):
        named = {name: template_text(text) if isinstance(text, str) else text for name, text in value.items()}
        return named["default"] if list(named) == ["default"] else named
    return value


def _processor(defaults: Mapping[str, Any]) -> Callable[[Any], Any]:
    def form(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        stated = {key: each for key, each in value.items() if each is not None and key not in _UNREAD_BY_PROCESSORS}
        kinds = [str(stated.pop(key)) for key in _TYPES if key in stated]
        size = dict(as_mapping(stated.get("size", defaults["size"])))
        for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            for holder in (size, stated):  # transformers 4 wrote the limits beside the size, too
                if old in holder:
                    size[new] = holder.pop(old)
        return {"type": _family_of(kinds), **defaults, **stated, "size": size}

    return form


def _family_of(kinds: list[str]) -> str:
    """A processor's class without what only says how fast it is; empty where none is named, which engines guess."""
    name = kinds[0] if kinds else ""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _sequence(value: Any) -> Any:
    """Without what is written for its default: sentence-transformers before 6 wrote two such fields."""
    if not isinstance(value, Mapping):
        return value
    return {key: each for key, each in value.items() if each is not None and (key, each) != ("do_lower_case", False)}


_FORMS: Final[Mapping[str, Callable[[Any], Any]]] = {
    CHAT_TEMPLATE.name: _template,
    IMAGE_PROCESSOR_FILE.name: _processor(IMAGE_PROCESSOR),
    VIDEO_PROCESSOR_FILE.name: _processor(VIDEO_PROCESSOR),
    SEQUENCE_CONFIG.name: _sequence,
    TYING.name: bool,
}


# The files of sentence-transformers, of which a score depends on a part.

_UNREAD_BY_MODULES: Final = ("idx", "name")
_MOVED: Final[Mapping[str, str]] = {
    f"sentence_transformers.{place}": name
    for name, places in {
        "Transformer": ("models.Transformer", "base.modules.transformer.Transformer"),
        "Pooling": ("models.Pooling", "sentence_transformer.modules.pooling.Pooling"),
        "Normalize": (
            "models.Normalize",
            "base.modules.normalize.Normalize",
            "sentence_transformer.modules.normalize.Normalize",
        ),
        "Dense": ("models.Dense", "base.modules.dense.Dense"),
    }.items()
    for place in places
}
"""Classes under the names that sentence-transformers and vLLM know them by: sentence_transformers/util/deprecated_import.py
and vllm/transformers_utils/config.py, _ST_POOLING_MODULE_TYPES. Any other name is another class, or none."""
_UNREAD_BY_MODELS: Final = ("__version__",)


def modules(value: Any) -> Any:
    """modules.json: classes, which sentence-transformers 6 moved to other modules, and their folders in order.

    Of several modules of one name the last takes the place of the first: sentence-transformers keeps them by name.
    """
    if not isinstance(value, list):
        return value
    named = {
        str(each.get("name", place)) if isinstance(each, Mapping) else str(place): each
        for place, each in enumerate(value)
    }
    return [_module(each) if isinstance(each, Mapping) else each for each in named.values()]


def _module(module: Mapping[str, Any]) -> Mapping[str, Any]:
    kept = {key: each for key, each in module.items() if key not in _UNREAD_BY_MODULES}
    kind = kept.get("type")
    if isinstance(kind, str):
        kept["type"] = _MOVED.get(kind, kind)
    return kept


def sentence_transformers_config(value: Any) -> Any:
    """config_sentence_transformers.json without the versions that wrote it and without nulls."""
    if not isinstance(value, Mapping):
        return value
    return {key: each for key, each in value.items() if key not in _UNREAD_BY_MODELS and each is not None}


def pooling(value: Any) -> Any:
    """A pooling module's config: sentence-transformers 6 writes one mode, earlier versions a flag for each."""
    if not isinstance(value, Mapping):
        return value
    flags = [
        key.removeprefix("pooling_mode_")
        for key, flag in value.items()
        if key.startswith("pooling_mode_") and flag is True
    ]
    modes = sorted(flags) if flags else [value.get("pooling_mode")]
    return {
        "modes": [_MODES.get(str(mode), mode) for mode in modes],
        "dimension": value.get("embedding_dimension", value.get("word_embedding_dimension")),
        "include_prompt": value.get("include_prompt", True),
        "weights": {key: each for key, each in value.items() if not key.startswith(_POOLING_FIELDS)},
    }


_MODES: Final = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "lasttoken": "lasttoken"}
_POOLING_FIELDS: Final = ("pooling_mode", "embedding_dimension", "word_embedding_dimension", "include_prompt")
