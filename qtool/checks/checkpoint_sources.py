"""A checkpoint's folder as engines read it: two sources of one thing, and files that change behaviour by being there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qtool.arch.config_fields import DECODER, NEVER_NULL, TOP, UNREAD, VISION, ConfigFields
from qtool.checks.checkpoint_model import CheckpointModel, as_mapping
from qtool.checks.comparable import agree
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.loaders import (
    ADAPTER,
    CODE_FIELD,
    CODE_FILES,
    DTYPE_PLACES,
    QTOOL,
    QUANTIZATION,
    ROPE_PLACES,
    THINGS,
    TYING,
    UNREAD_WEIGHTS,
    WEIGHT_RULES,
    FolderFiles,
    Thing,
    engine_names,
    weight_files,
)
from qtool.formats.floats import FLOAT_FORMATS
from qtool.storage.checkpoint import SINGLE, TensorInfo

_CONFIG: Final = "config.json"
_HEAD: Final = "lm_head.weight"
_TYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "half": "F16", "float": "F32"}
_PIECE: Final = 1 << 22
_OLD_FILES: Final = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"}
_REFERENCE: Final = re.compile(r"\{%[-+]?\s*(?:include|import|extends|from)\b")


def source_findings(model: CheckpointModel) -> Iterator[Finding]:
    """Everything that one engine takes from the folder and another does not."""
    folder = FolderFiles(model.checkpoint.directory, model.names)
    yield from _weight_findings(model, folder)
    yield from _presence_findings(model, folder)
    for thing in (*THINGS, TYING):
        yield from _place_findings(model, folder, thing)
    yield from _quantization_findings(model, folder)
    yield from _rope_findings(model)
    yield from _vocabulary_findings(model, folder)
    yield from _template_findings(model, folder)
    yield from _tied_head_findings(model)
    yield from _declared_type_findings(model, folder)


def _weight_findings(model: CheckpointModel, folder: FolderFiles) -> Iterator[Finding]:
    """Where an engine takes other weight files than qtool, which goes by the index before the single file."""
    own = folder.indexed or frozenset({SINGLE})
    others: dict[frozenset[str], list[str]] = {}
    for rule in WEIGHT_RULES:
        found = weight_files(rule, folder)
        if found != own:
            others.setdefault(found, []).append(rule.engine)
    for found, engines in others.items():
        agreeing = [rule.engine for rule in WEIGHT_RULES if rule.engine not in engines] or [QTOOL]
        yield model.found(
            "safetensors-two-weights",
            engines=engine_names(engines),
            found=listed(sorted(found)) if found else "nothing",
            others=engine_names(agreeing),
            expected=listed(sorted(own)),
        )
    unread = sorted(n for n in folder.top if any(fnmatchcase(n, pattern) for pattern in UNREAD_WEIGHTS))
    if unread:
        yield model.found("safetensors-unread-weights", names=listed_are(unread))


def _presence_findings(model: CheckpointModel, folder: FolderFiles) -> Iterator[Finding]:
    if ADAPTER in folder.top:
        yield model.found("safetensors-adapter", name=ADAPTER)
    for name in CODE_FILES:
        if folder.json(name).get(CODE_FIELD):
            yield model.found("safetensors-own-code", path=name)
    code = sorted(name for name in folder.top if name.endswith(".py"))
    if code:
        yield model.found("safetensors-code-file", names=listed(code))


def _place_findings(model: CheckpointModel, folder: FolderFiles, thing: Thing) -> Iterator[Finding]:
    """Two places of one thing that do not say the same."""
    places = dict.fromkeys(
        place for reading in thing.read(is_vision=model.family.is_vision) for place in reading.places
    )
    values = [(place, folder.value_at(place)) for place in places if place not in thing.substitutes]
    present = [(place, value) for place, value in values if value is not None]
    for place, value in present[1:]:
        if not agree(thing, value, present[0][1]):
            yield model.found("safetensors-two-sources", thing=thing.name, first=present[0][0], second=place)
            return


def _quantization_findings(model: CheckpointModel, folder: FolderFiles) -> Iterator[Finding]:
    """Two declarations in config.json; hf_quant_config.json has another form and is compared with the scales."""
    places = dict.fromkeys(
        place for each in QUANTIZATION.readings for place in each.places if place.startswith(_CONFIG)
    )
    present = [(place, value) for place in places if (value := folder.value_at(place)) is not None]
    for place, value in present[1:]:
        if value != present[0][1]:
            yield model.found("safetensors-two-sources", thing=QUANTIZATION.name, first=present[0][0], second=place)
            return


def _rope_findings(model: CheckpointModel) -> Iterator[Finding]:
    present = [as_mapping(model.detection.text.get(place)) for place in ROPE_PLACES]
    theta = model.detection.text.get("rope_theta")
    if all(present) and present[0] != present[1]:
        yield model.found(
            "safetensors-two-sources", thing="rotary embedding", first=ROPE_PLACES[0], second=ROPE_PLACES[1]
        )
        return
    inner = next((rope["rope_theta"] for rope in present if "rope_theta" in rope), None)
    if None not in (theta, inner) and theta != inner:
        yield model.found("safetensors-two-sources", thing="rotary base", first="rope_parameters", second="rope_theta")


def _vocabulary_findings(model: CheckpointModel, folder: FolderFiles) -> Iterator[Finding]:
    """The tokenizer in files of the time before tokenizer.json, which some programs still prefer."""
    if not _OLD_FILES & folder.top or model.tokenizer is None:
        return
    entries = as_mapping(model.tokenizer.get("model"))
    merges = [
        " ".join(map(str, each)) if isinstance(each, list) else str(each) for each in _list(entries.get("merges"))
    ]
    added = {
        str(as_mapping(e).get("content")): as_mapping(e).get("id") for e in _list(model.tokenizer.get("added_tokens"))
    }
    plain = {word: number for word, number in folder.json("vocab.json").items() if word not in added}
    rules = _merges(folder)
    differing = {
        "vocab.json": bool(plain) and plain != entries.get("vocab"),
        "merges.txt": bool(rules) and rules != merges,
        "added_tokens.json": any(
            added.get(token) != number for token, number in folder.json("added_tokens.json").items()
        ),
    }
    for name in (name for name, differs in differing.items() if differs):
        yield model.found("safetensors-two-sources", thing="vocabulary", first="tokenizer.json", second=name)
    config, mapped = folder.json("tokenizer_config.json"), folder.json("special_tokens_map.json")
    if any(_text(mapped[field]) != _text(config[field]) for field in mapped if field in config):
        names = {"first": "tokenizer_config.json", "second": "special_tokens_map.json"}
        yield model.found("safetensors-two-sources", thing="list of special tokens", **names)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(token: Any) -> Any:
    """A special token, or several, by their texts."""
    if isinstance(token, list):
        return [_text(each) for each in token]
    return token.get("content") if isinstance(token, Mapping) else token


def _merges(folder: FolderFiles) -> list[str]:
    """The rules in merges.txt, whose first line may name a version; empty where there is no such file."""
    text = folder.value_at("merges.txt") or ""
    return [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]


def _template_findings(model: CheckpointModel, folder: FolderFiles) -> Iterator[Finding]:
    """Templates that include another: engines render from a string and find no second file."""
    for name in sorted(folder.names):
        if name.endswith(".jinja") and (folder.directory / name).is_file() and _REFERENCE.search(folder.text(name)):
            yield model.found("safetensors-template-reference", path=name)


def _tied_head_findings(model: CheckpointModel) -> Iterator[Finding]:
    """A head that is stored although it is tied: transformers takes it where it differs, the others never."""
    head = model.weights.get(_HEAD)
    embedding = next((info for name, info in model.weights.items() if name.endswith("embed_tokens.weight")), None)
    is_tied = as_mapping(model.detection.config).get("tie_word_embeddings") is True
    if head is None or embedding is None or not is_tied or not model.location.is_local:
        return
    if not _is_same_tensor(model, head, embedding):
        yield model.found("safetensors-untied-head")


def _is_same_tensor(model: CheckpointModel, first: TensorInfo, second: TensorInfo) -> bool:
    """Value for value; the head of a large model is read for a second or two, and only where there is one."""
    if first.shape != second.shape or not {first.dtype, second.dtype} <= set(FLOAT_FORMATS):
        return False
    formats = [FLOAT_FORMATS[each.dtype] for each in (first, second)]
    elements = first.nbytes // formats[0].itemsize
    for start in range(0, elements, _PIECE):
        count = min(_PIECE, elements - start)
        values: list[NDArray[Any]] = []
        for info, element in zip((first, second), formats, strict=True):
            buffer = np.empty(count * element.itemsize, np.uint8)
            model.checkpoint.read_into(info, start * element.itemsize, buffer)
            bits = buffer.view(element.bits_dtype)
            values.append(bits if formats[0] == formats[1] else element.widen(bits))
        if not np.array_equal(values[0], values[1]):
            return False
    return True


def _declared_type_findings(model: CheckpointModel, folder: FolderFiles) -> Iterator[Finding]:
    declared = [value for place in DTYPE_PLACES if (value := folder.value_at(f"{_CONFIG}#{place}")) is not None]
    sizes: dict[str, int] = {}
    for name, info in model.weights.items():
        if name not in model.packed and info.dtype in FLOAT_FORMATS:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    stored = max(sizes, key=lambda dtype: sizes[dtype], default="")
    for value in declared if stored else ():
        named = _TYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
        if named is None and value != "auto":
            yield model.found("safetensors-unknown-type", found=repr(value))
            return
        if named not in (None, stored):
            yield model.found("safetensors-declared-type", found=value, stored=stored)
            return


# Wrong types. They are looked for before anything is computed from config.json: engines refuse such a file, or read it as
# something else.


def field_findings(config: Mapping[str, Any], target: object, *, is_vision: bool) -> Iterator[Finding]:
    """Every field whose value is of the wrong kind, or null where transformers refuses that."""
    whole, text = NEVER_NULL[""], NEVER_NULL["text_config"]
    sections: list[tuple[str, Any, ConfigFields, frozenset[str]]] = []
    if is_vision:
        sections += [
            ("", config, TOP, whole | NEVER_NULL["pictures"]),
            ("text_config.", config.get("text_config"), DECODER, text),
            ("vision_config.", config.get("vision_config"), VISION, NEVER_NULL["vision_config"]),
        ]
    else:
        sections.append(("", config, {**TOP, **DECODER}, whole | text | NEVER_NULL["text"]))
    wrong = False
    for prefix, section, fields, never_null in sections:
        present = as_mapping(section)
        for name, field in {**fields, **UNREAD}.items():
            value = present.get(name)
            if not field.accepts(value) or (value is None and name in present and name in never_null):
                wrong = True
                facts = {"field": prefix + name, "found": _shown(value), "expected": field.kind}
                yield finding("safetensors-field-type", target, **facts)
    decoder = as_mapping(config.get("text_config")) if is_vision else config
    yield from _rope_kinds(decoder, target)
    if not wrong:
        yield from _bound_findings(decoder, target, "text_config." if is_vision else "")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _bound_findings(decoder: Mapping[str, Any], target: object, prefix: str) -> Iterator[Finding]:
    """What transformers refuses beside another field: a row that the embedding lacks, and a kind for layers it lacks."""
    rows, row, layers = (decoder.get(name) for name in ("vocab_size", "pad_token_id", "num_hidden_layers"))
    if isinstance(rows, int) and isinstance(row, int) and not -rows <= row < rows:
        facts = {"field": f"{prefix}pad_token_id", "found": f"{row:,}", "expected": f"a token id below {rows:,}"}
        yield finding("safetensors-field-type", target, **facts)
    kinds = decoder.get("layer_types")
    if kinds is not None and len(kinds) != layers:
        facts = {"field": f"{prefix}layer_types", "found": f"a list of {len(kinds)}", "expected": f"one of {layers}"}
        yield finding("safetensors-field-type", target, **facts)


def _rope_kinds(text: Mapping[str, Any], target: object) -> Iterator[Finding]:
    kinds = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor", "factor": "rope_theta"}
    for place in ROPE_PLACES:
        rope = as_mapping(text.get(place))
        problems = [(f, DECODER[kind].kind) for f, kind in kinds.items() if not DECODER[kind].accepts(rope.get(f))]
        if not VISION["deepstack_visual_indexes"].accepts(rope.get("mrope_section")):
            problems.append(("mrope_section", "a list of numbers"))
        if not isinstance(rope.get("rope_type", rope.get("type", "")), str):
            problems.append(("rope_type", "a string"))
        for field, expected in problems:
            facts = {"field": f"{place}.{field}", "found": _shown(rope.get(field)), "expected": expected}
            yield finding("safetensors-field-type", target, **facts)
