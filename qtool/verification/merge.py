"""One report of several runs, each of which took its share of the queries.

Rule: the answers are joined and judged anew, as if one run had gathered them; what was not asked under the same
conditions (models, prompts, panels, recipe, versions) is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from qtool.answers.joined import join_ledgers
from qtool.arch.spec import Task
from qtool.comparison.stage import Outcome, Stage
from qtool.errors import UsageError
from qtool.inputs.builtin import load_panels
from qtool.inputs.panels import Panel
from qtool.recipe import parse_recipe
from qtool.verification.answers import answer
from qtool.verification.case import Case, VerifyOptions
from qtool.verification.checks import Checked
from qtool.verification.conclude import SCORED, conclude
from qtool.verification.folder import REPORT
from qtool.verification.noise import noise_panels
from qtool.verification.report import Report
from qtool.verification.voices import Heard, Voice, answer_file

_OWN: Final = ("shard",)
"""Settings in which the parts of one verification differ."""


def merge_reports(folders: Sequence[Path], output: Path) -> Report:
    """Join the runs in `folders` and judge them together; the answers go to `output`, which `folder.prepare` made.

    Panels are read again from where the runs read them and must be the same by their hash.
    """
    reports = {folder: read_report(folder) for folder in folders}
    _check_alike(reports)
    _check_complete(reports)
    case = _case(next(iter(reports.values())), output)
    heard = {voice: _joined(case, voice, reports, output) for voice in Voice if _has(voice, folders)}
    first = next(iter(reports.values()))
    seconds = sum(report.seconds for report in reports.values())
    return conclude(case, _checked(reports.values()), heard, round(seconds, 3), first.versions)


def read_report(folder: Path) -> Report:
    """The report of a finished run. Raises UsageError."""
    path = folder / REPORT
    try:
        return TypeAdapter(Report).validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{folder} holds no finished verification: {error.strerror} ({path.name}).") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UsageError(f"{path} is no report that this version reads: {place}: {problem['msg']}.") from error


def _check_alike(reports: dict[Path, Report]) -> None:
    (first_folder, first), *others = reports.items()
    for folder, report in others:
        for name, ours, theirs in _conditions(first, report):
            if ours != theirs:
                raise UsageError(
                    f"{first_folder} and {folder} are no parts of one verification: {name} is {ours} in one and "
                    f"{theirs} in the other."
                )


def _conditions(one: Report, other: Report) -> Iterable[tuple[str, Any, Any]]:
    for name in sorted({*one.settings, *other.settings} - set(_OWN)):
        yield name, one.settings.get(name), other.settings.get(name)
    for side in ("reference", "artefact"):
        for field in ("engine", "numbers", "sha256", "prompt_sha256"):
            yield f"{side} {field}", getattr(getattr(one, side), field), getattr(getattr(other, side), field)


def _check_complete(reports: dict[Path, Report]) -> None:
    shards = [str(report.settings.get("shard")) for report in reports.values()]
    count = shards[0].partition("/")[2]
    wanted = [f"{index}/{count}" for index in range(1, int(count) + 1)] if count else []
    if sorted(shards) != sorted(wanted):
        raise UsageError(
            f"These are the shards {', '.join(shards)}; a whole verification is {', '.join(wanted) or 'made with --shard'}.",
            "Pass the folder of each shard once.",
        )


def _case(report: Report, output: Path) -> Case:
    settings = report.settings
    options = VerifyOptions(
        settings["artefact"], settings["reference"], tuple(settings["panel_sources"]), Task(settings["task"]),
        dtype=settings["dtype"], limit=settings["limit"], noise_queries=settings["noise_queries"], output=output,
    )  # fmt: skip
    panels = load_panels(options.panels, options.limit)
    _check_panels(panels, settings["panels"])
    recipe = parse_recipe(settings["recipe_text"], report.recipe)
    return Case(
        options, Path(), None, "", Task(settings["task"]), report.task_source, settings["query_instruction"], recipe,
        tuple(panels),
    )  # fmt: skip


def _check_panels(panels: Sequence[Panel], wanted: Sequence[str]) -> None:
    for panel, sha256 in zip(panels, wanted, strict=True):
        if panel.sha256 != sha256:
            raise UsageError(f"The panel {panel.name} is not the one that the runs were asked: its hash differs.")


def _has(voice: Voice, folders: Sequence[Path]) -> bool:
    return answer_file(folders[0], voice).is_file()


def _joined(case: Case, voice: Voice, reports: dict[Path, Report], output: Path) -> Heard:
    first = next(iter(reports.values()))
    panels = noise_panels(case.panels, case.options.noise_queries) if voice is Voice.NOISE else case.panels
    known = join_ledgers([answer_file(folder, voice) for folder in reports], answer_file(output, voice), case.task)
    side = first.artefact if voice is Voice.ARTEFACT else first.reference
    return Heard(side, tuple(answer(panel, known, case.task, case.query_instruction) for panel in panels))


def _checked(reports: Iterable[Report]) -> Checked:
    """The stages that need no scores: of each, the worst that any run found; tables from the first run that has them."""
    stages: dict[str, Stage] = {}
    for stage in (stage for report in reports for stage in report.stages if stage.name not in SCORED):
        best = stages.get(stage.name)
        if best is None or _badness(stage.outcome) > _badness(best.outcome):
            stages[stage.name] = stage
    weights = next((report.weights for report in reports if report.weights), ())
    rederived = next((report.rederived for report in reports if report.rederived), ())
    return replace(Checked(), stages=tuple(stages.values()), weights=weights, rederived=rederived)


def _badness(outcome: Outcome) -> int:
    return [Outcome.SKIPPED, Outcome.PASS, Outcome.INCONCLUSIVE, Outcome.FAIL].index(outcome)
