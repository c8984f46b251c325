"""Verification from start to verdict: check, score both models on the same panels, compare, judge.

Rule: whatever can be refused is refused before the first model is loaded, and one model is in memory at a time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from qtool.arch.detect import Detection, detect
from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.inputs.builtin import default_panels, load_panels
from qtool.inputs.panels import Panel
from qtool.jsonfile import read_json
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.manifest import versions
from qtool.progress import StageProgress
from qtool.recipe import LoadedRecipe, load_recipe, parse_recipe
from qtool.verification.answers import Answers, answer, compare, work
from qtool.verification.gate import check_names, evaluate, verdict
from qtool.verification.report import Report, Side


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare on what.

    `panels` are files or built-in names, by default those that the model can read; `limit` takes the first queries of
    each; `recipe` overrides the artefact's own.
    """

    artefact: Path
    reference: Path
    panels: tuple[str, ...] = ()
    task: Task | None = None
    recipe: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    limit: int | None = None


def verify(options: VerifyOptions, progress: StageProgress | None = None) -> Report:
    """Score the artefact and its reference, and hold the recipe's gates against the difference."""
    started = time.monotonic()
    reference, artefact = detect(options.reference, options.task), detect(options.artefact, options.task)
    task, task_source = _task(reference, artefact)
    recipe = _recipe(options)
    gates = recipe.recipe.gates if recipe else {}
    check_names(gates)
    panels = _panels(options, reference)
    sides, answers = zip(
        *(_answers(options, role, task, panels, progress) for role in ("reference", "artefact")), strict=True
    )
    reports = tuple(compare(panel, *both) for panel, *both in zip(panels, *answers, strict=True))
    results = evaluate(gates, task, [(report.name, report.metrics) for report in reports])
    return Report(
        artefact=sides[1],
        reference=sides[0],
        task=task.value,
        task_source=task_source,
        stages=(),
        recipe=recipe.recipe.name if recipe else "",
        panels=reports,
        gates=results,
        verdict=verdict(results),
        seconds=round(time.monotonic() - started, 3),
        versions=versions("torch", "transformers", "tokenizers", "numpy", "pillow"),
    )


def _task(reference: Detection, artefact: Detection) -> tuple[Task, str]:
    if reference.architecture.family != artefact.architecture.family:
        raise ModelError(
            f"The artefact is a {artefact.architecture.name}, the reference a {reference.architecture.name}."
        )
    if None not in (reference.task, artefact.task) and reference.task is not artefact.task:
        raise ModelError(
            f"The artefact is for {artefact.task_source}, the reference for {reference.task_source}.",
            "One of the two folders is not what it was meant to be; --task overrides both.",
        )
    source = reference if reference.task else artefact
    return source.require_task(), source.task_source


def _recipe(options: VerifyOptions) -> LoadedRecipe | None:
    if options.recipe is not None:
        return load_recipe(options.recipe)
    manifest = options.artefact / MANIFEST
    if not manifest.is_file():
        return None
    recipe = read_json(manifest).get("recipe")
    text = recipe.get("text") if isinstance(recipe, dict) else None
    if not isinstance(text, str):
        raise ModelError(f"{manifest} does not hold the recipe's text.", "Name a recipe with --recipe.")
    return parse_recipe(text, f"the recipe in {manifest}")


def _panels(options: VerifyOptions, detection: Detection) -> list[Panel]:
    is_vision = detection.architecture.is_vision
    panels = load_panels(options.panels or default_panels(is_vision=is_vision), options.limit)
    if not is_vision:
        for panel in panels:
            _refuse_pictures(panel, detection)
    return panels


def _refuse_pictures(panel: Panel, detection: Detection) -> None:
    for pair in panel.pairs:
        for item in (pair.query, pair.document):
            if item.image or item.video:
                raise UsageError(
                    f"Panel {panel.name}, query {pair.query.id!r}: item {item.id!r} holds a picture, and "
                    f"{detection.architecture.name} reads text only.",
                    "Choose a text panel for this model.",
                )


def _answers(
    options: VerifyOptions, role: str, task: Task, panels: list[Panel], progress: StageProgress | None
) -> tuple[Side, list[Answers]]:
    from qtool.scoring.reference import ScorerOptions, open_scorer

    directory = options.reference if role == "reference" else options.artefact
    scorer = open_scorer(directory, ScorerOptions(task, options.dtype, options.device))
    report = _Counter(role, sum(work(panel, task, scorer.query_instruction) for panel in panels), progress)
    identity = scorer.identity
    side = Side(str(directory), identity.engine, identity.numbers, identity.model, identity.prompt)
    return side, [answer(panel, scorer, task, report) for panel in panels]


class _Counter:
    """Adds up what a scorer reports, since it counts from zero on each panel."""

    def __init__(self, role: str, total: int, progress: StageProgress | None) -> None:
        self._role, self._total, self._progress = role, total, progress
        self._done = 0
        self._show()

    def __call__(self, _place: int, _answer: object) -> None:
        self._done += 1
        self._show()

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(self._role, self._done, self._total)
