"""A checkpoint's folder against the reference's: config, tensors, tokenizer and side files.

Rule: headers and small files only. Side files are compared as what they say, JSON by its values and the rest by its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qtool.arch.detect import Detection
from qtool.arch.prompts import reranker_prompt
from qtool.arch.rerank_template import FILE_NAME as RERANK_TEMPLATE
from qtool.arch.rerank_template import rerank_template
from qtool.arch.spec import Presence, Task
from qtool.checkpoint.reader import Checkpoint
from qtool.checkpoint.sidecars import find_sidecars
from qtool.comparison.catalogue import finding
from qtool.comparison.structure_config import config_facts, fact_findings
from qtool.comparison.structure_tokenizer import tokenizer_findings
from qtool.formats.floats import FLOAT_FORMATS
from qtool.inspection.catalogue import listed, listed_are
from qtool.inspection.checkpoint_model import CheckpointModel
from qtool.inspection.finding import Finding
from qtool.jsonfile import read_json

_TOKENIZER: Final = "tokenizer.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_PADDING: Final = "padding_side"
_SPECIAL: Final = ("truncation_side", "add_bos_token", "add_eos_token", "bos_token", "eos_token", "pad_token")
_EFFECTS: Final[Mapping[str, str]] = {
    "modules.json": "sentence-transformers then builds a fresh, random head",
    "chat_template.": "vLLM and sentence-transformers then read another prompt",
    "additional_chat_templates": "vLLM and sentence-transformers then read another prompt",
    "preprocessor_config.json": "engines prepare pictures by it",
    "processor_config.json": "engines prepare pictures by it",
    "video_preprocessor_config.json": "engines prepare videos by it",
    "config_sentence_transformers.json": "sentence-transformers takes task and prompts from it",
    "sentence_bert_config.json": "sentence-transformers takes lengths and processor arguments from it",
    "1_LogitScore": "sentence-transformers takes the answers' tokens from it",
    "1_Pooling": "sentence-transformers pools by it",
    "2_Normalize": "sentence-transformers normalizes by it",
}  # fmt: skip
"""By the beginning of a side file's path: what depends on it. Others matter to nobody's scores."""


def folder_findings(
    folder: Path, checkpoint: Checkpoint, detection: Detection, reference: Checkpoint, expected: Detection
) -> Iterator[Finding]:
    """Everything in which `folder` is not what quantizing or copying the reference gives."""
    if detection.architecture != expected.architecture:
        names = detection.architecture.name, expected.architecture.name
        yield finding("other-architecture", folder, found=names[0], expected=names[1])
        return
    yield from fact_findings(folder, config_facts(detection), config_facts(expected))
    mine = CheckpointModel(checkpoint, detection, str(folder), ())
    yield from _tensor_findings(folder, mine, CheckpointModel(reference, expected, "", ()))
    yield from _packing_findings(folder, mine)
    yield from _tokenizer_findings(folder, reference.directory)
    yield from _side_file_findings(folder, reference.directory)
    yield from _template_findings(folder, expected)


def size_ratio(checkpoint: Checkpoint, reference: Checkpoint) -> float:
    """Bytes of all tensors over the reference's."""
    mine, theirs = (sum(info.nbytes for info in each.tensors.values()) for each in (checkpoint, reference))
    return mine / theirs if theirs else 0.0


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


def _tokenizer_findings(folder: Path, reference: Path) -> Iterator[Finding]:
    if (folder / _TOKENIZER).is_file() and not _is_same(folder / _TOKENIZER, reference / _TOKENIZER):
        yield from tokenizer_findings(folder, read_json(folder / _TOKENIZER), read_json(reference / _TOKENIZER))
    if (folder / _TOKENIZER_CONFIG).is_file() and (reference / _TOKENIZER_CONFIG).is_file():
        found, expected = read_json(folder / _TOKENIZER_CONFIG), read_json(reference / _TOKENIZER_CONFIG)
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
    official = rerank_template(reranker_prompt(is_vision=expected.architecture.is_vision))
    if path.read_text(encoding="utf-8", errors="replace").strip() != official.strip():
        yield finding("other-rerank-template", folder)
