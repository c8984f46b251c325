"""The GGUF files of a place: language models, projectors, and files of others.

Rule: every file gets an artefact of its own; how two fit together is said at the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Final

from qtool.arch.families import FAMILIES
from qtool.arch.spec import Task
from qtool.checks.findings import Finding, finding
from qtool.checks.gguf_language import (
    LanguageModel,
    language_model,
    marker_findings,
    markers,
    position_findings,
    tokenizer_findings,
    tokenizer_markers,
)
from qtool.checks.gguf_tensors import (
    Projector,
    head_findings,
    pair_findings,
    projector_findings,
    projector_markers,
    scale_findings,
    stored_tensors,
    tensor_findings,
)
from qtool.checks.report import Artefact, tensor_classes
from qtool.export.gguf_metadata import ARCHITECTURE as CLIP
from qtool.progress import StageProgress
from qtool.storage.gguf import parse_gguf
from qtool.storage.gguf_model import GgufModel, expected_parts, model_files
from qtool.storage.location import ArtefactLocation

_PROJECTOR_NAME: Final = "mmproj"
"""What llama.cpp looks for in the names beside a language model."""
_MODEL_TYPES: Final = (None, "model", "mmproj")


def gguf_artefacts(place: ArtefactLocation, task: Task | None, progress: StageProgress) -> Iterator[Artefact]:
    """One artefact for each model; the projectors beside a selected file are read, and judged by its model only."""
    wanted = model_files(place.names, place.selected)
    others = model_files([name for name in place.names if _PROJECTOR_NAME in name], None)
    beside = {n: files for n, files in others.items() if n not in wanted and _lies_beside(n, next(iter(wanted)))}
    models = {}
    for done, (name, files) in enumerate({**wanted, **beside}.items()):
        progress("GGUF headers", done, len(wanted) + len(beside))
        models[name] = _read_model(place, name, files)
    progress("GGUF headers", len(models), len(models))
    projectors = [Projector(model) for model in models.values() if _architecture(model) == CLIP]
    for name in sorted(wanted, key=lambda each: _architecture(models[each]) == CLIP):  # projectors last
        yield _artefact(place, models[name], projectors, task)


def _read_model(place: ArtefactLocation, name: str, files: Sequence[str]) -> GgufModel:
    parts = {}
    for file in files:
        with place.open(file) as source:
            parts[file] = parse_gguf(source)
    missing = tuple(part for part in expected_parts(files) if part not in parts)
    return GgufModel(name, place.path_of(files[0]), parts, missing)


def _architecture(model: GgufModel) -> str | None:
    return model.text("general.architecture")


def _artefact(place: ArtefactLocation, model: GgufModel, projectors: list[Projector], task: Task | None) -> Artefact:
    architecture = _architecture(model)
    family = next((f for f in FAMILIES if f.gguf_architecture == architecture), None)
    if model.text("general.type") in _MODEL_TYPES and family is not None:
        described = language_model(model, family, task)
        return _language_artefact(place, described, [p for p in projectors if _lies_beside(p.file.name, model.name)])
    if architecture == CLIP and Projector(model).is_known:
        return _projector_artefact(Projector(model))
    return _foreign_artefact(model)


def _lies_beside(projector: str, model: str) -> bool:
    return PurePosixPath(projector).parent in (PurePosixPath(model).parent, PurePosixPath())


def _language_artefact(place: ArtefactLocation, model: LanguageModel, projectors: list[Projector]) -> Artefact:
    task = model.task.value if model.task else "unknown"
    described = dict([*markers(model), *tokenizer_markers(model), *model.positions.markers()])
    if model.family.is_vision:
        described["projector"] = ", ".join(each.file.name for each in projectors) or "missing"
    return Artefact(
        model.file.name, "gguf", f"{model.family.name} {model.positions.size}".rstrip(), model.family.gguf_architecture,
        task, model.task_source, model.file.file_type, tensor_classes(stored_tensors(model.file)), described,
        tuple(_language_findings(place, model, projectors)),
    )  # fmt: skip


def _language_findings(place: ArtefactLocation, model: LanguageModel, projectors: list[Projector]) -> list[Finding]:
    incomplete = list(_part_findings(model.file))
    if model.file.missing_parts:  # whose fields and tensors would all be found missing
        return incomplete
    return [
        *incomplete,
        *marker_findings(model),
        *head_findings(place, model),
        *tokenizer_findings(model),
        *position_findings(model),
        *tensor_findings(model),
        *scale_findings(place, model),
        *pair_findings(model, projectors),
    ]


def _projector_artefact(projector: Projector) -> Artefact:
    return Artefact(
        projector.file.name, "gguf projector", "Qwen3-VL", CLIP, "", "", projector.file.file_type,
        tensor_classes(stored_tensors(projector.file)), dict(projector_markers(projector)),
        (*_part_findings(projector.file), *projector_findings(projector)),
    )  # fmt: skip


def _foreign_artefact(model: GgufModel) -> Artefact:
    architecture, kind = _architecture(model), model.text("general.type") or "model"
    if architecture is None and kind == "model":
        found = finding("gguf-no-architecture", model.target)
    else:
        found = finding("gguf-foreign", model.target, what=f"a GGUF {kind} of the architecture {architecture}")
    return Artefact(
        model.name, f"gguf {kind}", "unknown", architecture or "unknown", "", "", model.file_type,
        tensor_classes(stored_tensors(model)), {}, (*_part_findings(model), found),
    )  # fmt: skip


def _part_findings(model: GgufModel) -> Iterator[Finding]:
    count = len(model.parts) + len(model.missing_parts)
    if model.missing_parts:
        yield finding("gguf-missing-part", model.target, count=count, missing=model.missing_parts[0])
        return
    declared = model.integer("split.tensors.count")
    if declared is not None and declared != len(model.tensors):
        yield finding("gguf-part-count", model.target, found=len(model.tensors), declared=declared)
