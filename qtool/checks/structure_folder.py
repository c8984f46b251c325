"""A checkpoint's folder against the reference's: config, tensors, tokenizer, and side files as each engine takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from qtool.arch.detect import Detection
from qtool.arch.prompts import FILE_NAME as RERANK_TEMPLATE
from qtool.arch.prompts import rerank_template
from qtool.arch.spec import Presence, Task
from qtool.artefact import CheckpointArtefact
from qtool.checks.checkpoint_model import CheckpointModel
from qtool.checks.comparable import agree, modules, pooling, sentence_transformers_config, template_text
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.loaders import CHAT_TEMPLATE, PROCESSOR, THINGS, TOKENIZER_FILES, FolderFiles, Thing, taken
from qtool.checks.structure_config import config_findings
from qtool.checks.structure_tokenizer import folder_tokenizer_findings
from qtool.formats.floats import FLOAT_FORMATS
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.storage.checkpoint import Checkpoint, find_sidecars

_EFFECTS: Final[Mapping[str, str]] = {
    "tokenizer.json": "qtool and TEI take the tokenizer from it",
    "tokenizer_config.json": "transformers, vLLM and SGLang take the tokenizer's class, limits and added tokens from it",
    "special_tokens_map.json": "transformers takes special tokens from it",
    "added_tokens.json": "transformers takes added tokens from it",
    "tokenizer.model": "llama.cpp's converter takes the tokenizer from it",
    "modules.json": "sentence-transformers takes head, pooling and normalization from it",
    "additional_chat_templates": "SGLang then finds no single template, and others may take another one",
    "config_sentence_transformers.json": "sentence-transformers takes task and prompts from it",
    "1_LogitScore": "sentence-transformers takes the answers' tokens from it",
    "1_Pooling": "sentence-transformers and vLLM pool with it",
    "2_Normalize": "sentence-transformers normalizes with it",
}  # fmt: skip
"""By the beginning of a side file's path: what depends on it. No score depends on others."""
_MODULE_EFFECT: Final = "sentence-transformers loads it as a part of the model"
_IDS_JUDGED: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files whose effect on ids is judged by `folder_tokenizer_findings`."""
_FORMS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "modules.json": modules,
    "config_sentence_transformers.json": sentence_transformers_config,
    "1_Pooling/config.json": pooling,
}
_LISTS: Final = ("modules.json",)


def folder_findings(
    artefact: CheckpointArtefact, reference: CheckpointArtefact, *, weights: bool = True
) -> Iterator[Finding]:
    """Everything in which the artefact is not what quantizing or copying the reference gives; `weights` or all but those."""
    folder, detection, expected = artefact.path, artefact.detection, reference.detection
    if detection.architecture != expected.architecture:
        names = detection.architecture.name, expected.architecture.name
        yield finding("other-architecture", folder, found=names[0], expected=names[1])
        return
    yield from config_findings(folder, detection, expected)
    mine, theirs = CheckpointModel.of(artefact), CheckpointModel.of(reference)
    if weights:
        yield from _tensor_findings(folder, mine, theirs)
        yield from _packing_findings(folder, mine)
    yield from folder_tokenizer_findings(artefact, reference)
    yield from _thing_findings(folder, mine, theirs)
    yield from _processor_findings(folder, mine, theirs)
    yield from _side_file_findings(folder, reference.path, is_vision=detection.family.is_vision)
    yield from _template_findings(mine, expected)


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
    return (*shape[:-1], 2 * shape[-1]) if name in model.packed and shape else shape


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


# Templates and processors, as each engine takes them from both folders. A file that no engine would take, since another
# one comes first, is not compared: that both are there is a warning of the inspection.


def _thing_findings(folder: Path, mine: CheckpointModel, theirs: CheckpointModel) -> Iterator[Finding]:
    ours, reference = _files(mine), _files(theirs)
    seen: set[str] = set()
    for thing in THINGS:
        for found in _differences(folder, thing, ours, reference, is_vision=mine.family.is_vision):
            if found.sentence not in seen:
                seen.add(found.sentence)
                yield found


def _files(model: CheckpointModel) -> FolderFiles:
    return FolderFiles(model.checkpoint.directory, model.names)


def _differences(
    folder: Path, thing: Thing, mine: FolderFiles, theirs: FolderFiles, *, is_vision: bool
) -> Iterator[Finding]:
    for reading in thing.read(is_vision=is_vision):
        found, expected = taken(reading, mine), taken(reading, theirs)
        if found is None and expected is not None:
            yield finding("missing-side-file", folder, name=_file_of(expected[0]), effect=thing.effect)
        elif found is not None and expected is None:
            yield finding("added-side-file", folder, name=_file_of(found[0]), effect=thing.effect)
        elif found is not None and expected is not None and not agree(thing, found[1], expected[1]):
            yield finding("other-side-file", folder, name=_file_of(found[0]), effect=thing.effect)


def _processor_findings(folder: Path, mine: CheckpointModel, theirs: CheckpointModel) -> Iterator[Finding]:
    """Another class of processor; where none is named, transformers takes that of the model."""
    if mine.family.vision is None:
        return
    for reading in PROCESSOR.read(is_vision=True):
        found, expected = taken(reading, _files(mine)), taken(reading, _files(theirs))
        known = (mine.family.vision.processor, expected[1] if expected else None)
        if found is not None and found[1] not in known:
            yield finding("other-side-file", folder, name=_file_of(found[0]), effect=PROCESSOR.effect)


def _file_of(place: str) -> str:
    return place.partition("#")[0]


# The other side files, by content: JSON by its values, the rest by its bytes.


def _side_file_findings(folder: Path, reference: Path, *, is_vision: bool) -> Iterator[Finding]:
    judged = {*_IDS_JUDGED, *_thing_files(is_vision=is_vision)}
    both = [{path.as_posix() for path in find_sidecars(each)} for each in (folder, reference)]
    for name in sorted(both[0] | both[1]):
        effect = next((effect for start, effect in _EFFECTS.items() if name.startswith(start)), "")
        effect = effect or (_MODULE_EFFECT if name[:1].isdigit() else "")
        if name not in both[0]:
            if effect and name not in _thing_files(is_vision=is_vision) and not _is_folded(name, folder):
                yield finding("missing-side-file", folder, name=name, effect=effect)
        elif name in judged:
            continue
        elif name not in both[1]:
            if effect and not _is_unread_module(name, folder) and not _is_same_vocabulary(name, reference):
                yield finding("added-side-file", folder, name=name, effect=effect)
        elif not _is_same(name, folder, reference):
            yield finding("other-side-file" if effect else "other-minor-file", folder, name=name, effect=effect)


def _thing_files(*, is_vision: bool) -> set[str]:
    """The files of which what engines take from them is compared."""
    readings = [reading for thing in THINGS for reading in thing.read(is_vision=is_vision)]
    return {_file_of(place) for reading in readings for place in reading.places} - {"tokenizer_config.json"}


def _is_folded(name: str, folder: Path) -> bool:
    """Whether transformers 5 leaves the file out, since tokenizer.json and tokenizer_config.json say the same."""
    return name in ("special_tokens_map.json", "added_tokens.json") and (folder / "tokenizer.json").is_file()


def _is_unread_module(name: str, folder: Path) -> bool:
    """Whether the file lies in a module's folder that modules.json does not name, so that nothing loads it."""
    modules_file = folder / "modules.json"
    if "/" not in name or not name[:1].isdigit() or not modules_file.is_file():
        return False
    paths = [each.get("path") for each in read_json(modules_file, list) if isinstance(each, Mapping)]
    return name.partition("/")[0] not in paths


def _is_same_vocabulary(name: str, reference: Path) -> bool:
    """Whether a file of the tokenizer is one that transformers leaves unread beside tokenizer.json."""
    return name in TOKENIZER_FILES and name.startswith(("vocab", "merges")) and (reference / "tokenizer.json").is_file()


def _is_same(name: str, folder: Path, reference: Path) -> bool:
    """Byte for byte, or of JSON what engines take from it."""
    paths = folder / name, reference / name
    if paths[0].read_bytes() == paths[1].read_bytes():
        return True
    if name.endswith(".jinja"):
        texts = [template_text(path.read_text(encoding="utf-8", errors="replace")) for path in paths]
        return texts[0] == texts[1]
    if not name.endswith(".json"):
        return False
    form = _FORMS.get(name, lambda value: value)
    kind = list if name in _LISTS else object
    return bool(form(read_json(paths[0], kind)) == form(read_json(paths[1], kind)))


# The template that `qtool serve-command` passes to vLLM and SGLang.


def _template_findings(mine: CheckpointModel, expected: Detection) -> Iterator[Finding]:
    if expected.task is not Task.RERANK or expected.architecture.head != "lm_head":
        return
    folder, official = mine.artefact.path, template_text(rerank_template(expected.family.reranker))
    if (folder / RERANK_TEMPLATE).is_file():
        if template_text(_files(mine).text(RERANK_TEMPLATE)) != official:
            yield finding("other-rerank-template", folder)
    elif _is_promised(folder) or (mine.packed and not _has_official_template(mine, official)):
        yield finding("missing-rerank-template", folder)


def _is_promised(folder: Path) -> bool:
    """Whether the manifest lists the template, or a link to it leads nowhere."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    listed_files = manifest.get("files")
    return (folder / RERANK_TEMPLATE).is_symlink() or (
        isinstance(listed_files, Mapping) and RERANK_TEMPLATE in listed_files
    )


def _has_official_template(mine: CheckpointModel, official: str) -> bool:
    """Whether engines need no other template, since the chat template is the official one."""
    readings = CHAT_TEMPLATE.read(is_vision=mine.family.is_vision)
    values = [found[1] for each in readings if (found := taken(each, _files(mine))) is not None]
    return bool(values) and all(isinstance(value, str) and template_text(value) == official for value in values)
