"""The GGUF files of a place by themselves: language models, projectors, and files of unknown families."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from qtool.arch.families import FAMILIES, gguf_families
from qtool.arch.family import Family
from qtool.arch.spec import Task
from qtool.artefact import GgufArtefact, ProjectorCandidate, fitting_projectors, projector_type, projectors_beside
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
    classed_tensors,
    head_findings,
    load_findings,
    pair_findings,
    projector_findings,
    projector_markers,
    scale_findings,
    stray_scale_findings,
    tensor_findings,
    type_findings,
)
from qtool.checks.report import InspectedArtefact, tensor_classes
from qtool.progress import StageProgress
from qtool.storage.gguf_model import PROJECTOR, TOKEN_EMBEDDING, GgufModel, model_files, open_gguf_model
from qtool.storage.location import ArtefactLocation

_MODEL_TYPES: Final = (None, "model", "mmproj")


def inspect_gguf_files(
    location: ArtefactLocation, task: Task | None, progress: StageProgress
) -> Iterator[InspectedArtefact]:
    """One result for each model; the projectors beside a selected file are read, and judged by its model only."""
    wanted = model_files(location.names, location.selected)
    models = {}
    for done, (name, files) in enumerate(wanted.items()):
        progress("GGUF headers", done, len(wanted))
        models[name] = open_gguf_model(location, files)
    progress("GGUF headers", len(models), len(models))
    for model in sorted(models.values(), key=lambda each: each.architecture == PROJECTOR):  # projectors last
        family = gguf_families().get(model.architecture or "")
        sees = family is not None and family.is_vision
        yield _inspected(model, list(projectors_beside(location, model.name, models)) if sees else (), task)


def gguf_findings(artefact: GgufArtefact, task: Task) -> list[Finding]:
    """What is wrong with an opened GGUF model for `task` and with its projector."""
    projector = artefact.projector
    found = list(_inspected(artefact.model, artefact.candidates, task).findings)
    return found + list(_inspected(projector, (), None).findings) if projector else found


def _inspected(model: GgufModel, candidates: Sequence[ProjectorCandidate], task: Task | None) -> InspectedArtefact:
    family = gguf_families().get(model.architecture or "")
    # llama.cpp goes by the architecture and never reads general.type of what it loads as a model
    is_model = model.text("general.type") in _MODEL_TYPES or TOKEN_EMBEDDING in model.tensors
    if is_model and family is not None:
        return _language_model(language_model(model, family, task), candidates)
    family = _family_of_projector(model)
    return _projector(Projector(model, family)) if family is not None else _foreign(model)


def _family_of_projector(model: GgufModel) -> Family | None:
    if model.architecture != PROJECTOR:
        return None
    known = {each.vision.projector_type: each for each in FAMILIES.values() if each.vision is not None}
    return known.get(projector_type(model))


def _language_model(model: LanguageModel, candidates: Sequence[ProjectorCandidate]) -> InspectedArtefact:
    fitting = fitting_projectors(model.file, model.family, candidates)
    described = dict([*markers(model), *tokenizer_markers(model), *model.positions.markers()])
    if model.family.is_vision:
        named = [each.name for each in fitting] or [each.name for each in candidates]
        described["projector"] = ", ".join(named) or "missing"
    return InspectedArtefact(
        name=model.file.name,
        kind="gguf",
        family=model.positions.model,
        architecture=model.family.gguf_architecture,
        task=model.task.value if model.task else "unknown",
        task_source=model.task_source,
        format=model.file.file_type,
        classes=tensor_classes(classed_tensors(model.file)),
        markers=described,
        findings=tuple(_language_findings(model, fitting, candidates)),
    )


def _language_findings(
    model: LanguageModel, fitting: Sequence[GgufModel], candidates: Sequence[ProjectorCandidate]
) -> Iterator[Finding]:
    yield from _part_findings(model.file)
    if model.file.missing_parts:  # whose fields and tensors would all be found missing
        return
    yield from load_findings(model)
    yield from marker_findings(model)
    yield from head_findings(model)
    yield from tokenizer_findings(model)
    yield from position_findings(model)
    yield from tensor_findings(model)
    yield from scale_findings(model)
    yield from stray_scale_findings(model)
    yield from type_findings(model)
    yield from pair_findings(model, fitting, candidates)


def _projector(projector: Projector) -> InspectedArtefact:
    return InspectedArtefact(
        name=projector.file.name,
        kind="gguf projector",
        family=projector.family.name,
        architecture=PROJECTOR,
        format=projector.file.file_type,
        classes=tensor_classes(classed_tensors(projector.file)),
        markers=dict(projector_markers(projector)),
        findings=(*_part_findings(projector.file), *projector_findings(projector)),
    )


def _foreign(model: GgufModel) -> InspectedArtefact:
    architecture, kind = model.architecture, model.text("general.type") or "model"
    if architecture is None and kind == "model":
        found = finding("gguf-no-architecture", model.target)
    else:
        found = finding("gguf-foreign", model.target, what=f"a GGUF {kind} of the architecture {architecture}")
    return InspectedArtefact(
        name=model.name,
        kind=f"gguf {kind}",
        family="unknown",
        architecture=architecture or "unknown",
        format=model.file_type,
        classes=tensor_classes(classed_tensors(model)),
        findings=(*_part_findings(model), found),
    )


def _part_findings(model: GgufModel) -> Iterator[Finding]:
    count = len(model.parts) + len(model.missing_parts)
    if model.missing_parts:
        yield finding("gguf-missing-part", model.target, count=count, missing=model.missing_parts[0])
        return
    declared = model.integer("split.tensors.count")
    if declared is not None and declared != len(model.tensors):
        yield finding("gguf-part-count", model.target, found=len(model.tensors), declared=declared)
