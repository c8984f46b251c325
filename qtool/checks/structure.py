"""Stage 1: what headers and small files tell, in seconds and without a weight."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from gguf.constants import TokenType

from qtool.arch.detect import Detection, detect
from qtool.arch.prompts import reranker_prompt
from qtool.arch.spec import Task
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.inspect import inspect
from qtool.checks.sides import GgufFiles, GgufSide, Planned, gguf_files, open_reference, plan_conversion, read_side
from qtool.checks.stage import STRUCTURE, Stage, concluded
from qtool.checks.structure_folder import fact_findings, folder_findings, size_ratio, vocabulary_problem
from qtool.errors import ModelError
from qtool.export.gguf_metadata import ARCHITECTURE as PROJECTOR
from qtool.export.gguf_metadata import DEFAULT_KEY, NAMES_KEY, RERANK_KEY, baked_instruction
from qtool.formats.ggml import BF16, F16, F32
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.storage.checkpoint import Checkpoint, open_checkpoint
from qtool.storage.gguf import Value
from qtool.storage.output import manifest_of

# A GGUF file against what converting the reference would write: fields, tokens, names, shapes and protected types. A
# field that no score depends on (names, licences, sampling) is not compared; what upstream's converter writes passes.


_TOKENS: Final = "tokenizer.ggml."
_LISTS: Final = ("tokens", "token_type", "merges")
_FLOATS: Final = (F32, F16, BF16)
_SCALES: Final = (".scale", ".input_scale")
_PIXELS: Final = ("clip.vision.image_mean", "clip.vision.image_std")
_JUDGED_ALONE: Final = (".pooling_type", ".classifier.output_labels")
"""What the inspection has judged without the reference."""
_ADDED: Final = (TokenType.CONTROL, TokenType.USER_DEFINED)


def language_findings(side: GgufSide, planned: Planned, task: Task | None, *, is_vision: bool) -> Iterator[Finding]:
    """Everything in which the language model is not what converting the reference gives."""
    architecture = _data(planned.metadata, "general.architecture")
    found = _data(side.metadata, "general.architecture")
    if found != architecture:
        yield finding("other-architecture", side.path, found=str(found), expected=architecture)
        return
    yield from _field_findings(side, planned, f"{architecture}.")
    yield from _token_findings(side, planned)
    yield from _template_findings(side, planned)
    if task is Task.RERANK:
        yield from _instruction_findings(side, is_vision=is_vision)
    yield from _tensor_findings(side, planned)


def projector_findings(side: GgufSide, planned: Planned) -> Iterator[Finding]:
    """Likewise of the vision projector."""
    yield from _field_findings(side, planned, f"{PROJECTOR}.vision.")
    yield from _tensor_findings(side, planned)


def _field_findings(side: GgufSide, planned: Planned, prefix: str) -> Iterator[Finding]:
    keys = [k for k in planned.metadata if k.startswith(prefix) and not k.endswith(_JUDGED_ALONE)]
    for key in (key for key in keys if key in _PIXELS and _data(side.metadata, key) != planned.metadata[key].data):
        yield finding(
            "other-side-file", side.path, name=key, effect="pictures are normalized by it", maker="convert-gguf"
        )
    expected = {key.removeprefix(prefix): planned.metadata[key].data for key in keys if key not in _PIXELS}
    mine = {field: _data(side.metadata, prefix + field) for field in expected}
    yield from fact_findings(side.path, mine, expected)


def _data(metadata: Mapping[str, Value], key: str) -> Any:
    return metadata[key].data if key in metadata else None


def _token_findings(side: GgufSide, planned: Planned) -> Iterator[Finding]:
    mine, theirs = (
        {part: _data(metadata, _TOKENS + part) or [] for part in _LISTS}
        for metadata in (side.metadata, planned.metadata)
    )
    entries = list(zip(theirs["tokens"], theirs["token_type"], strict=True))
    found = dict(enumerate(zip(mine["tokens"], mine["token_type"], strict=False)))
    lost = [entry[0] for place, entry in enumerate(entries) if entry[1] in _ADDED and found.get(place) != entry]
    plain = [text for text, kind in entries if kind not in _ADDED]
    known = set(plain)
    problem = vocabulary_problem([text for text in mine["tokens"] if text in known], plain)
    problem = problem or vocabulary_problem(mine["merges"], theirs["merges"])
    if problem:
        yield finding("other-tokenizer", side.path, problem=problem, maker="convert-gguf")
    elif lost:
        yield finding("added-token-missing", side.path, tokens=listed_are(lost), maker="convert-gguf")
    yield from _special_findings(side, planned)


def _special_findings(side: GgufSide, planned: Planned) -> Iterator[Finding]:
    for key, value in planned.metadata.items():
        field = key.removeprefix(_TOKENS)
        if field != key and field not in _LISTS and _data(side.metadata, key) != value.data:
            found = str(_data(side.metadata, key))
            yield finding("other-special-tokens", side.path, field=key, found=found, expected=str(value.data))


def _template_findings(side: GgufSide, planned: Planned) -> Iterator[Finding]:
    for key, value in planned.metadata.items():
        is_template = key.startswith(DEFAULT_KEY) and key not in (RERANK_KEY, NAMES_KEY)
        if is_template and _data(side.metadata, key) != value.data:
            yield finding("other-chat-template", side.path, field=key)


def _instruction_findings(side: GgufSide, *, is_vision: bool) -> Iterator[Finding]:
    """Another instruction in the official prompt, unless the file's manifest says that it was asked for."""
    official = reranker_prompt(is_vision=is_vision)
    template = _data(side.metadata, RERANK_KEY)
    instruction = baked_instruction(template, official) if isinstance(template, str) else None
    if instruction not in (None, official.default_instruction) and template != _declared_template(side.path):
        yield finding("other-instruction", side.path, instruction=instruction)


def _declared_template(path: Path) -> Any:
    for manifest in (manifest_of(path), path.with_name(MANIFEST)):
        if manifest.is_file():
            prompt = read_json(manifest).get("prompt")
            return prompt.get("template") if isinstance(prompt, dict) else None
    return None


def _tensor_findings(side: GgufSide, planned: Planned) -> Iterator[Finding]:
    expected = {tensor.output.gguf_name: tensor.output for tensor in planned.file.tensors}
    missing = [name for name in expected if name not in side.tensors]
    if missing:
        yield finding("missing-tensor", side.path, tensors=listed_are(missing), maker="convert-gguf")
    extra = [name for name in side.tensors if name not in expected and not name.endswith(_SCALES)]
    if extra:
        yield finding("extra-tensor", side.path, tensors=listed(extra), maker="convert-gguf")
    present = [(side.tensors[name][1], output) for name, output in expected.items() if name in side.tensors]
    for tensor, output in present:
        if tensor.shape != output.shape:
            facts = {"found": list(tensor.shape), "expected": list(output.shape), "maker": "convert-gguf"}
            yield finding("other-shape", side.path, tensor=output.gguf_name, **facts)
            break
    for tensor, output in present:
        if output.type in _FLOATS and tensor.type not in _FLOATS:
            yield finding("protected-type", side.path, tensor=output.gguf_name, found=tensor.type.name)
            break


# Stage 1: what headers and small files tell, in seconds and without a weight. First everything that an inspection
# knows of the artefact by itself, then what only the reference can tell.


def check_structure(artefact: Path, reference: Path, task: Task | None = None, mmproj: Path | None = None) -> Stage:
    """Compare the artefact (a checkpoint's folder, a GGUF file or a folder of those) with the folder `reference`.

    `task` is needed where the reference declares none. Raises ModelError if the reference is broken, UsageError if it is
    quantized; what is wrong with the artefact is a finding.
    """
    started = time.monotonic()
    checkpoint, detection = open_reference(reference, task)
    files = gguf_files(artefact, mmproj)
    findings: list[Finding] = []
    ratio = 0.0
    try:
        for each in files.paths if files else (artefact,):
            findings += inspect(str(each), detection.task if files and each == files.language else task).findings
        if files:
            more, ratio = _gguf_findings(files, checkpoint, detection)
            findings += more
        else:
            own = open_checkpoint(artefact)
            findings += folder_findings(artefact, own, detect(artefact, task), checkpoint, detection)
            ratio = size_ratio(own, checkpoint)
    except ModelError as error:
        findings.append(finding("unreadable", artefact, problem=str(error)))
    return concluded(STRUCTURE, started, findings, f"As the reference would have it, {ratio:.2f} of its size.")


def _gguf_findings(files: GgufFiles, reference: Checkpoint, detection: Detection) -> tuple[list[Finding], float]:
    """What is wrong with the files, and their size in parts of the reference's."""
    is_vision = detection.architecture.is_vision
    wants_projector = is_vision and files.projector is not None
    language, projector = plan_conversion(reference.directory, detection.task, projector=wants_projector)
    sides = [read_side(path) for path in files.paths]
    findings = list(language_findings(sides[0], language, detection.task, is_vision=is_vision))
    if projector:
        findings += projector_findings(sides[1], projector)
    stored = sum(info.nbytes for info in reference.tensors.values())
    return findings, sum(side.nbytes for side in sides) / stored
