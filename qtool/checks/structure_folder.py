"""A checkpoint's folder against the reference's: config, tensors, tokenizer and side files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qtool.arch.detect import Detection
from qtool.arch.prompts import FILE_NAME as RERANK_TEMPLATE
from qtool.arch.prompts import rerank_template
from qtool.arch.spec import Presence, Task
from qtool.artefact import CheckpointArtefact
from qtool.checks.checkpoint_model import CheckpointModel
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.export.gguf_metadata import decoder_fields
from qtool.formats.floats import FLOAT_FORMATS
from qtool.jsonfile import read_json
from qtool.storage.checkpoint import Checkpoint, find_sidecars

# Whether two tokenizer.json split every text into the same tokens; the order of keys and the spelling of merges do not
# matter.

_RULES: Final = ("normalizer", "pre_tokenizer", "post_processor")
_MARKS: Final = ("special", "lstrip", "rstrip", "normalized", "single_word")


def tokenizer_findings(target: object, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    """What keeps `found` from giving the ids that `expected` gives."""
    words, wanted = _vocabulary(found), _vocabulary(expected)
    problem = vocabulary_problem(list(words.items()), list(wanted.items())) or _merge_problem(found, expected)
    if problem:
        yield finding("other-tokenizer", target, problem=problem)
        return
    added, needed = _added(found), _added(expected)
    lost = [token for token, marks in needed.items() if added.get(token, {}).get("id") != marks["id"]]
    if lost:
        yield finding("added-token-missing", target, tokens=listed(lost))
        return
    parts = [part for part in _RULES if found.get(part) != expected.get(part)]
    for part in parts or (["added_tokens"] if added != needed else []):
        yield finding("other-tokenizer-rules", target, part=part)


def vocabulary_problem(found: list[Any], expected: list[Any]) -> str:
    """How two vocabularies differ, or nothing; entries are compared as a whole."""
    if found == expected:
        return ""
    known = {str(entry) for entry in found}
    missing = [entry for entry in expected if str(entry) not in known]
    if not missing and len(found) == len(expected):
        missing = [e for f, e in zip(found, expected, strict=True) if f != e]
    if not missing:
        return f"it has {len(found):,} tokens; the reference has {len(expected):,}"
    return f"{len(missing):,} of {len(expected):,} tokens differ, such as {missing[0]}"


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    return dict(sorted(vocabulary.items(), key=lambda entry: str(entry[1])))


def _merge_problem(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    mine, theirs = _merges(found), _merges(expected)
    return "" if mine == theirs else f"its merge rules differ ({len(mine):,}; the reference has {len(theirs):,})"


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    merges = tokenizer.get("model", {}).get("merges", [])
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def _added(tokenizer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The added tokens by their text."""
    added = tokenizer.get("added_tokens") or []
    return {each["content"]: {"id": each["id"], **{mark: each.get(mark) for mark in _MARKS}} for each in added}


# What a model computes, as its config.json declares it, against the reference's. Fields are compared with defaults filled
# in, since transformers 4 and 5 write the same config differently. What no score depends on is not compared.

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
    config, text = detection.config, detection.text
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    facts = {key: value.data for key, value in decoder_fields(detection.family, text).items()}
    facts |= {
        "hidden_act": text.get("hidden_act", "silu"),
        "attention_bias": bool(text.get("attention_bias")),
        "use_sliding_window": bool(text.get("use_sliding_window")),
        "vocab_size": text.get("vocab_size"),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
    }
    return facts | _vision_facts(detection, rope) if detection.family.is_vision else facts


def _vision_facts(detection: Detection, rope: Mapping[str, Any]) -> dict[str, Any]:
    config = detection.config
    return {
        "mrope_interleaved": bool(rope.get("mrope_interleaved", True)),
        **{f"vision.{field}": detection.vision.get(field, default) for field, default in _VISION.items()},
        **{field: config.get(field) for field in _TOKEN_IDS},
    }


def fact_findings(target: object, found: Facts, expected: Facts) -> Iterator[Finding]:
    """Each field in which the artefact differs; fields that the reference lacks do not count."""
    for field, value in expected.items():
        if found.get(field) != value:
            code = "other-token-ids" if field in _TOKEN_IDS else _CODES.get(field, "other-size")
            yield finding(code, target, field=field, found=_shown(found.get(field)), expected=_shown(value))


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value:,g}" if isinstance(value, float) else str(value)


# The folder as a whole. Side files are compared by content: JSON by its values, the rest by its bytes.

_TOKENIZER: Final = "tokenizer.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_PADDING: Final = "padding_side"
_SPECIAL: Final = ("truncation_side", "add_bos_token", "add_eos_token", "bos_token", "eos_token", "pad_token")
_EFFECTS: Final[Mapping[str, str]] = {
    "modules.json": "sentence-transformers then builds a new, random head",
    "chat_template.": "vLLM and sentence-transformers then read another prompt",
    "additional_chat_templates": "vLLM and sentence-transformers then read another prompt",
    "preprocessor_config.json": "engines prepare pictures with it",
    "processor_config.json": "engines prepare pictures with it",
    "video_preprocessor_config.json": "engines prepare videos with it",
    "config_sentence_transformers.json": "sentence-transformers takes task and prompts from it",
    "sentence_bert_config.json": "sentence-transformers takes lengths and processor arguments from it",
    "1_LogitScore": "sentence-transformers takes the answers' tokens from it",
    "1_Pooling": "sentence-transformers pools with it",
    "2_Normalize": "sentence-transformers normalizes with it",
}  # fmt: skip
"""By the beginning of a side file's path: what depends on it. No score depends on others."""


def folder_findings(artefact: CheckpointArtefact, reference: CheckpointArtefact) -> Iterator[Finding]:
    """Everything in which the artefact is not what quantizing or copying the reference gives."""
    folder, detection, expected = artefact.path, artefact.detection, reference.detection
    if detection.architecture != expected.architecture:
        names = detection.architecture.name, expected.architecture.name
        yield finding("other-architecture", folder, found=names[0], expected=names[1])
        return
    yield from fact_findings(folder, config_facts(detection), config_facts(expected))
    mine = CheckpointModel.of(artefact)
    yield from _tensor_findings(folder, mine, CheckpointModel.of(reference))
    yield from _packing_findings(folder, mine)
    yield from _tokenizer_findings(artefact, reference)
    yield from _side_file_findings(folder, reference.path)
    yield from _template_findings(folder, expected)


def nbytes_of(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors."""
    return sum(info.nbytes for info in checkpoint.tensors.values())


def _tensor_findings(folder: Path, mine: CheckpointModel, theirs: CheckpointModel) -> Iterator[Finding]:
    needed = [n for n in theirs.weights if theirs.specs[n].presence is not Presence.DUPLICATE]
    missing = [name for name in needed if name not in mine.weights]
    if "lm_head.weight" in missing:
        yield finding("missing-head", folder)
    if missing:
        yield finding("missing-tensor", folder, tensors=listed_are(missing))
    extra = [n for n in mine.weights if n not in theirs.weights and mine.specs[n].presence is not Presence.DUPLICATE]
    if extra:
        yield finding("extra-tensor", folder, tensors=listed(extra))
    present = [name for name in needed if name in mine.weights]
    for name in present:
        found, expected = _unpacked_shape(mine, name), theirs.weights[name].shape
        if found != expected:
            yield finding("other-shape", folder, tensor=name, found=list(found), expected=list(expected))
            break
    yield from _type_findings(folder, mine, theirs, present)


def _unpacked_shape(model: CheckpointModel, name: str) -> tuple[int, ...]:
    shape = model.weights[name].shape
    return (*shape[:-1], 2 * shape[-1]) if name in model.packed else shape


def _type_findings(folder: Path, mine: CheckpointModel, theirs: CheckpointModel, names: list[str]) -> Iterator[Finding]:
    plain = [(name, mine.weights[name].dtype, theirs.weights[name].dtype) for name in names if name not in mine.packed]
    lossy = [each for each in plain if each[1] != each[2] and each[1] in FLOAT_FORMATS and each[1] != "F32"]
    if lossy:
        names = [name for name, *_ in lossy]
        yield finding("narrower-type", folder, tensors=listed_are(names), found=lossy[0][1], expected=lossy[0][2])


def _packing_findings(folder: Path, mine: CheckpointModel) -> Iterator[Finding]:
    declared = mine.detection.config.get("quantization_config")
    if declared is None:
        return
    quantizable = [name for name, spec in mine.specs.items() if spec.fused_group]
    packed = sum(name in mine.packed for name in quantizable)
    if not mine.packed:
        algorithm = declared.get("quant_algo") if isinstance(declared, Mapping) else declared
        yield finding("nothing-quantized", folder, algorithm=str(algorithm))
    elif packed < len(quantizable) / 2:
        yield finding("mostly-unquantized", folder, found=packed, expected=len(quantizable))


def _tokenizer_findings(artefact: CheckpointArtefact, reference: CheckpointArtefact) -> Iterator[Finding]:
    folder, theirs = artefact.path, reference.path
    if (folder / _TOKENIZER).is_file() and not _is_same(folder / _TOKENIZER, theirs / _TOKENIZER):
        yield from tokenizer_findings(folder, artefact.tokenizer, reference.tokenizer)
    if (folder / _TOKENIZER_CONFIG).is_file() and (theirs / _TOKENIZER_CONFIG).is_file():
        found, expected = read_json(folder / _TOKENIZER_CONFIG), read_json(theirs / _TOKENIZER_CONFIG)
        yield from _declared_findings(folder, found, expected)


def _declared_findings(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Finding]:
    sides = found.get(_PADDING, "right"), expected.get(_PADDING, "right")  # transformers' default
    if sides[0] != sides[1]:
        yield finding("other-padding-side", folder, found=sides[0], expected=sides[1], name=_TOKENIZER_CONFIG)
    for field in _SPECIAL:
        values = _content(found.get(field)), _content(expected.get(field))
        if values[0] != values[1]:
            yield finding("other-special-tokens", folder, field=field, found=str(values[0]), expected=str(values[1]))
    if found.get("chat_template") != expected.get("chat_template") and "chat_template" in expected:
        yield finding("other-side-file", folder, name=_TOKENIZER_CONFIG, effect=_EFFECTS["chat_template."])


def _content(token: Any) -> Any:
    """The text of a special token, which may be written as an object; absent and null are the same."""
    return token.get("content") if isinstance(token, Mapping) else token


def _side_file_findings(folder: Path, reference: Path) -> Iterator[Finding]:
    for path in find_sidecars(reference):
        name = path.as_posix()
        if name in (_TOKENIZER, _TOKENIZER_CONFIG):
            continue
        effect = next((effect for start, effect in _EFFECTS.items() if name.startswith(start)), "")
        if not (folder / path).is_file():
            if effect:
                yield finding("missing-side-file", folder, name=name, effect=effect)
        elif not _is_same(folder / path, reference / path):
            code = "other-side-file" if effect else "other-minor-file"
            yield finding(code, folder, name=name, effect=effect)


def _is_same(path: Path, other: Path) -> bool:
    """Byte for byte, or of JSON value for value."""
    if not other.is_file():
        return False
    mine, theirs = path.read_bytes(), other.read_bytes()
    if mine == theirs or path.suffix != ".json":
        return mine == theirs
    try:
        return bool(json.loads(mine) == json.loads(theirs))
    except ValueError:
        return False


def _template_findings(folder: Path, expected: Detection) -> Iterator[Finding]:
    path = folder / RERANK_TEMPLATE
    if expected.task is not Task.RERANK or expected.architecture.head != "lm_head" or not path.is_file():
        return
    official = rerank_template(expected.family.reranker)
    if path.read_text(encoding="utf-8", errors="replace").strip() != official.strip():
        yield finding("other-rerank-template", folder)
