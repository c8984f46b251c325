"""The structure stage: what headers and small files tell, in seconds and without a weight."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gguf.constants import TokenType

from qtool.arch.prompts import PromptSpec
from qtool.arch.spec import Task
from qtool.artefact import Artefact, GgufArtefact
from qtool.checks.checkpoint import checkpoint_findings
from qtool.checks.checkpoint_model import CheckpointModel
from qtool.checks.checkpoint_quantization import foreign_quantization
from qtool.checks.checkpoint_sources import source_findings
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.gguf import gguf_findings
from qtool.checks.reference import Planned, Reference
from qtool.checks.stage import STRUCTURE, Outcome, Stage, concluded
from qtool.checks.structure_config import fact_findings
from qtool.checks.structure_folder import folder_findings, nbytes_of
from qtool.checks.structure_tokenizer import vocabulary_problem
from qtool.errors import ModelError
from qtool.export.gguf_metadata import DEFAULT_KEY, NAMES_KEY
from qtool.formats.ggml import FLOAT_TYPES
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.storage.atomic import manifest_of
from qtool.storage.gguf import Value
from qtool.storage.gguf_model import PROJECTOR, RERANK_KEY, GgufModel

# A GGUF file against what converting the reference would write: fields, tokens, names, shapes and protected types. A
# field that no score depends on (names, licences, sampling) is not compared; what upstream's converter writes passes.

_TOKENS: Final = "tokenizer.ggml."
_LISTS: Final = ("tokens", "token_type", "merges")
_SCALES: Final = (".scale", ".input_scale")
_PIXELS: Final = ("clip.vision.image_mean", "clip.vision.image_std")
_JUDGED_ALONE: Final = (".pooling_type", ".classifier.output_labels")
"""What the inspection has judged without the reference."""
_INHERITED: Final = (
    "safetensors-two-sources",
    "safetensors-own-code",
    "safetensors-code-file",
    "safetensors-declared-type",
    "safetensors-unread-weights",
)
"""What is no fault where the reference has it, too: every engine then reads the same from both."""
_ADDED: Final = (TokenType.CONTROL, TokenType.USER_DEFINED)


def language_findings(side: GgufModel, reference: Reference) -> Iterator[Finding]:
    """Everything in which the language model is not what converting the reference gives."""
    planned, architecture = reference.language, reference.family.gguf_architecture
    if side.architecture != architecture:
        yield finding("other-architecture", side.path, found=str(side.architecture), expected=architecture)
        return
    yield from _field_findings(side, planned, f"{architecture}.")
    yield from _token_findings(side, planned)
    yield from _template_findings(side, planned)
    if reference.detection.task is Task.RERANK:
        yield from _instruction_findings(side, reference.family.reranker)
    yield from _tensor_findings(side, planned)


def projector_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    """Likewise of the vision projector."""
    yield from _field_findings(side, planned, f"{PROJECTOR}.vision.")
    yield from _tensor_findings(side, planned)


def _field_findings(side: GgufModel, planned: Planned, prefix: str) -> Iterator[Finding]:
    keys = [k for k in planned.metadata if k.startswith(prefix) and not k.endswith(_JUDGED_ALONE)]
    for key in (key for key in keys if key in _PIXELS and _data(side.metadata, key) != planned.metadata[key].data):
        yield finding("other-side-file", side.path, name=key, effect="pictures are normalized with it")
    expected = {key.removeprefix(prefix): planned.metadata[key].data for key in keys if key not in _PIXELS}
    mine = {field: _data(side.metadata, prefix + field) for field in expected}
    yield from fact_findings(side.path, mine, expected)


def _data(metadata: Mapping[str, Value], key: str) -> Any:
    return metadata[key].data if key in metadata else None


def _token_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
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
        yield finding("other-tokenizer", side.path, problem=problem)
    elif lost:
        yield finding("added-token-missing", side.path, tokens=listed(lost))
    yield from _special_findings(side, planned)


def _special_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    for key, value in planned.metadata.items():
        field = key.removeprefix(_TOKENS)
        if field != key and field not in _LISTS and _data(side.metadata, key) != value.data:
            found = str(_data(side.metadata, key))
            yield finding("other-special-tokens", side.path, field=key, found=found, expected=str(value.data))


def _template_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    for key, value in planned.metadata.items():
        is_template = key.startswith(DEFAULT_KEY) and key not in (RERANK_KEY, NAMES_KEY)
        if is_template and _data(side.metadata, key) != value.data:
            yield finding("other-chat-template", side.path, field=key)


def _instruction_findings(side: GgufModel, official: PromptSpec) -> Iterator[Finding]:
    """Another instruction in the official prompt, unless the file's manifest says that it was asked for."""
    template = side.text(RERANK_KEY) or ""
    instruction = official.instruction_in(template)
    if instruction not in (None, official.default_instruction) and template != _declared_template(side.path):
        yield finding("other-instruction", side.path, instruction=instruction)


def _declared_template(path: Path) -> Any:
    for manifest in (manifest_of(path), path.with_name(MANIFEST)):
        if manifest.is_file():
            prompt = read_json(manifest).get("prompt")
            return prompt.get("template") if isinstance(prompt, dict) else None
    return None


def _tensor_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    expected = {tensor.output.gguf_name: tensor.output for tensor in planned.file.tensors}
    missing = [name for name in expected if name not in side.tensors]
    if missing:
        yield finding("missing-tensor", side.path, tensors=listed_are(missing))
    extra = [name for name in side.tensors if name not in expected and not name.endswith(_SCALES)]
    if extra:
        yield finding("extra-tensor", side.path, tensors=listed(extra))
    present = [(side.tensors[name], output) for name, output in expected.items() if name in side.tensors]
    for tensor, output in present:
        if tensor.shape != output.shape:
            facts = {"found": list(tensor.shape), "expected": list(output.shape)}
            yield finding("other-shape", side.path, tensor=output.gguf_name, **facts)
            break
    for tensor, output in present:
        if output.type in FLOAT_TYPES and tensor.type not in FLOAT_TYPES:
            yield finding("protected-type", side.path, tensor=output.gguf_name, found=tensor.type.name)
            break


# The stage: first everything that an inspection knows of the artefact by itself, then what only the reference can tell.


def check_structure(artefact: Artefact, reference: Reference) -> Stage:
    """Compare the artefact with the reference, which must declare its task or have been opened with one.

    Raises ModelError if the reference is broken, UsageError if it is quantized; what is wrong with the artefact is a
    finding.
    """
    started = time.monotonic()
    reference.require_unquantized()
    findings: list[Finding] = []
    ratio, unread = 0.0, ""
    try:
        if isinstance(artefact, GgufArtefact):
            findings += _gguf_findings(artefact, reference)
            nbytes = sum(model.nbytes for model in artefact.models)
        else:
            unread = foreign_quantization(artefact.checkpoint)
            inherited = {each for each in source_findings(CheckpointModel.of(reference)) if each.code in _INHERITED}
            findings += [each for each in checkpoint_findings(artefact) if each not in inherited]
            if not any(each.code == "safetensors-field-type" for each in findings):
                findings += folder_findings(artefact, reference, weights=not unread)
            nbytes = nbytes_of(artefact.checkpoint)
        ratio = nbytes / max(nbytes_of(reference.checkpoint), 1)
    except ModelError as error:
        findings.append(finding("unreadable", artefact.path, problem=str(error)))
    good = f"Matches the reference in structure, at {ratio:.2f} of its size."
    if unread:
        findings.append(finding("unread-quantization", artefact.path, what=unread))
        good = findings[-1].sentence
    stage = concluded(STRUCTURE, started, findings, good)
    return replace(stage, outcome=Outcome.INCONCLUSIVE) if unread and stage.outcome is Outcome.PASS else stage


def _gguf_findings(artefact: GgufArtefact, reference: Reference) -> Iterator[Finding]:
    yield from gguf_findings(artefact, reference.detection.require_task())
    yield from language_findings(artefact.model, reference)
    if artefact.projector is not None and reference.family.is_vision:
        yield from projector_findings(artefact.projector, reference.projector)
