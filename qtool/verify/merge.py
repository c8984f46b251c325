"""One report of several runs, each of which took its share of the queries.

Rule: the answers are joined and judged anew, as if one run had gathered them; what was not asked under the same
conditions (models, prompts, panels, recipe, versions) is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from qtool.arch.spec import Task
from qtool.checks.stage import Outcome, Stage
from qtool.errors import UsageError
from qtool.inputs.builtin import load_panels
from qtool.inputs.panels import Panel, PanelShard
from qtool.recipe import parse_recipe
from qtool.scoring.remembering import UnansweredError, copy_ledgers, read_ledgers
from qtool.scoring.scorer import Scorer
from qtool.verify.case import REPORT, Case, VerifyOptions, check_output, prepare_folder
from qtool.verify.collect import Answers, Role, RoleScores, answer, answer_file
from qtool.verify.conclude import SCORED, conclude, noise_panels
from qtool.verify.report import Report, parse_report
from qtool.verify.stages import Checked

_OWN: Final = ("shard",)
"""Settings in which the parts of one verification differ."""


_AGAIN: Final = "Verify that shard again: the same command with --force."


def merge_reports(folders: Sequence[Path], output: Path, *, force: bool = False) -> Report:
    """Join the runs in `folders` and judge them together; their answers go to `output`, which `force` begins anew.

    Panels are read again from where the runs read them and must be the same by their hash. Without answers of a shard
    that an earlier stage stopped, nothing is scored and that stage's failure is the verdict.
    """
    reports = {folder: read_report(folder) for folder in folders}
    _refuse_an_input(folders, output)
    check_output(output, force=force)
    if not force:
        _refuse_answers(output)
    _check_alike(reports)
    _check_complete(reports)
    case = _case(next(iter(reports.values())), output)
    parts = _parts(reports)
    collected = {role: _collected(case, role, files, reports) for role, files in parts.items()}
    report = _concluded(case, reports.values(), collected)
    prepare_folder(output, force=force)  # not before: an older report is not lost to shards that cannot be merged
    for role, files in parts.items():
        copy_ledgers(files, answer_file(output, role))
    return report


def read_report(folder: Path) -> Report:
    """The report of a finished run. Raises UsageError."""
    path = folder / REPORT
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{folder} holds no finished verification: {error.strerror} ({path.name}).") from error
    try:
        return parse_report(content)
    except ValueError as error:
        raise UsageError(f"{path} is not a report that this version reads: {error}.", _AGAIN) from error


def _refuse_an_input(folders: Iterable[Path], output: Path) -> None:
    if any(_is_same(output, folder) for folder in folders):
        raise UsageError(f"{output} is one of the shards to merge.", "Name another folder for the whole.")


def _refuse_answers(output: Path) -> None:
    # A run goes on with them; a merge would write whole files in their place.
    if any(answer_file(output, role).exists() for role in Role):
        raise UsageError(f"{output} holds answers of an unfinished verification.", "Pass --force to replace them.")


def _is_same(output: Path, folder: Path) -> bool:
    try:
        return output.samefile(folder)
    except OSError:  # the shard was read, so an output that cannot be looked at is another
        return False


def _check_alike(reports: Mapping[Path, Report]) -> None:
    for name, said in _conditions(reports):
        for folder, theirs in said.items():
            first, ours = next(iter(said.items()))
            if ours != theirs:
                raise UsageError(
                    f"{first} and {folder} are no parts of one verification: {name} is {ours} in one and {theirs} in "
                    "the other."
                )


def _conditions(reports: Mapping[Path, Report]) -> Iterable[tuple[str, dict[Path, Any]]]:
    """What must be the same, as each run says it; of sides that answered nothing there is nothing to say."""
    names = {name for report in reports.values() for name in report.settings}
    for name in sorted(names - set(_OWN)):
        yield name, {folder: report.settings.get(name) for folder, report in reports.items()}
    scored = {folder: report for folder, report in reports.items() if _is_scored(report)}
    for side in ("reference", "artefact"):
        for field in ("engine", "numbers", "sha256", "prompt_sha256"):
            yield f"{side} {field}", {folder: getattr(getattr(each, side), field) for folder, each in scored.items()}


def _is_scored(report: Report) -> bool:
    return bool(report.panels)


def _was_stopped(report: Report) -> bool:
    return not _is_scored(report) and any(stage.outcome is Outcome.FAIL for stage in report.stages)


def _check_complete(reports: dict[Path, Report]) -> None:
    whole = [folder for folder, report in reports.items() if not report.settings.get("shard")]
    if whole:
        raise UsageError(
            f"{whole[0]} holds a whole verification, no shard of one.",
            f"It is judged already: see {whole[0] / REPORT}.",
        )
    shards = [str(report.settings["shard"]) for report in reports.values()]
    count = shards[0].partition("/")[2]
    wanted = [f"{index}/{count}" for index in range(1, int(count) + 1)]
    if sorted(shards) != sorted(wanted):
        raise UsageError(
            f"These are the shards {', '.join(shards)}; a whole verification is {', '.join(wanted)}.",
            "Pass the folder of each shard once.",
        )


def _case(report: Report, output: Path) -> Case:
    settings = report.settings
    options = VerifyOptions(
        settings["artefact"], settings["reference"], tuple(settings["panel_sources"]), Task(settings["task"]),
        dtype=settings["dtype"], limit=settings["limit"], noise_queries=settings["noise_queries"], output=output,
    )  # fmt: skip
    panels = load_panels(options.panels, options.limit) if settings["panels"] else []  # none with --structure-only
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


def _parts(reports: Mapping[Path, Report]) -> dict[Role, list[Path]]:
    """The files of answers that there are: a shard past the queries asked for noise has none of it."""
    said = reports.values()
    if any(map(_was_stopped, said)) or not any(map(_is_scored, said)):
        return {}
    roles = [role for role in Role if role is not Role.NOISE or any(report.noise for report in said)]
    parts = {role: [answer_file(folder, role) for folder in reports] for role in roles}
    return {role: _existing(role, files) for role, files in parts.items()}


def _existing(role: Role, files: Sequence[Path]) -> list[Path]:
    found = [file for file in files if file.is_file()]
    if not found:  # without them all the report would be about files alone, and pass
        raise UsageError(f"No run has kept what {role.value} answered.", "Verify the shards again.")
    return found


def _collected(case: Case, role: Role, files: Sequence[Path], reports: Mapping[Path, Report]) -> RoleScores:
    scored = next(filter(_is_scored, reports.values()))
    known = read_ledgers(files, case.task)
    side = scored.artefact if role is Role.ARTEFACT else scored.reference
    try:
        return RoleScores(side, _answers(case, role, known, case.panels), _seconds(role, reports.values()))
    except UnansweredError:
        for folder, report in reports.items():
            _check_answered(case, role, known, folder, PanelShard.parse(report.settings["shard"]))
        raise


def _seconds(role: Role, reports: Iterable[Report]) -> float:
    """How long all shards collected a role; reports count the reference and the artefact together, so that is the latter's."""
    name = {Role.NOISE: "noise", Role.ARTEFACT: "scores"}.get(role)
    return sum(stage.seconds for report in reports for stage in report.stages if stage.name == name)


def _check_answered(case: Case, role: Role, known: Scorer, folder: Path, shard: PanelShard) -> None:
    """Raise UsageError where a question of the shard in `folder` has no answer."""
    try:
        _answers(case, role, known, [panel.shard(shard) for panel in case.panels], shard)
    except UnansweredError as error:
        raise UsageError(f"{folder} has lost what {role.value} answered. {error.message}", _AGAIN) from error


def _answers(
    case: Case, role: Role, known: Scorer, panels: Sequence[Panel], shard: PanelShard | None = None
) -> tuple[Answers, ...]:
    asked = noise_panels(panels, case.options.noise_queries, shard) if role is Role.NOISE else panels
    return tuple(answer(panel, known, case.task, case.query_instruction) for panel in asked)


def _concluded(case: Case, reports: Collection[Report], collected: Mapping[Role, RoleScores]) -> Report:
    seconds = round(sum(report.seconds for report in reports), 3)
    return conclude(case, _checked(reports), collected, seconds, next(iter(reports)).versions)


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
