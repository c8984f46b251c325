"""Joins runs that each took a share of the queries: their answers are judged as if one run had collected them.

Runs of different models, prompts, panels, recipes or settings are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qtool.arch.spec import Task
from qtool.checks.stage import Outcome, Stage
from qtool.errors import UsageError, reason
from qtool.inputs.builtin import load_panels
from qtool.inputs.media import DISTRUST, MediaAccess
from qtool.inputs.panels import Panel, PanelShard
from qtool.jsonfile import read_bounded
from qtool.recipe import parse_recipe
from qtool.scoring.joined_ledgers import UnansweredError, copy_ledgers, read_ledgers
from qtool.scoring.scorer import Scorer
from qtool.verify.case import REPORT, Case, Role, VerifyOptions, answer_file, check_output, prepare_folder
from qtool.verify.collect import PanelScores, RoleScores, role_panels, score_panel
from qtool.verify.conclude import NOISE, SCORED, SCORES, conclude
from qtool.verify.report import AnswerCount, Report, RunFacts, parse_report
from qtool.verify.stages import Checked

_SHARD: Final = "shard"
"""The one setting in which the runs of one verification differ."""

_MAX_REPORT: Final = 1 << 30
_LONGEST_RUN: Final = 1e9
"""Seconds, 30 years."""
_SHARDS_SHOWN: Final = 16
_AGAIN: Final = "Verify that shard again: the same command with --force."


class _Settings(BaseModel):
    """What a shard's report says of how it was made; anything may be in a file that came from another machine."""

    model_config = ConfigDict(strict=True, frozen=True)

    artefact: str
    reference: str
    task: Literal["rerank", "embed"]
    panels: list[str]
    panel_sources: list[str]
    limit: int | None
    dtype: str
    noise_queries: Annotated[int, Field(ge=0)]
    query_instruction: str | None
    recipe_text: str
    shard: str | None
    undecided_panels: list[str] = []


def merge_runs(folders: Sequence[Path], output: Path, access: MediaAccess = DISTRUST, *, force: bool = False) -> Report:
    """Join the runs in `folders` and judge them together; their answers go to `output`, which `force` replaces.

    Panels are read again from where the runs read them and must have the same hash. Without answers of a shard that an
    earlier stage stopped, nothing is scored and that stage's failure is the verdict.
    """
    reports = {folder: _read_shard(folder) for folder in folders}
    if any(_is_same(output, folder) for folder in folders):
        raise UsageError(f"{output} is one of the shards to merge.", "Choose another output folder.")
    check_output(output, force=force)
    # A run would resume these answers; a merge replaces whole files.
    if not force and any(answer_file(output, role).exists() for role in Role):
        raise UsageError(f"{output} holds answers of an unfinished verification.", "Pass --force to replace them.")
    _check_alike(reports)
    _check_complete(reports)
    case = _case(next(iter(reports.values())), output, access)
    ledgers = _ledgers(reports)
    scores = {role: _scores(case, role, files, reports) for role, files in ledgers.items()}
    report = _concluded(case, reports.values(), scores)
    prepare_folder(output, force=force)  # last: an older report must not be lost to shards that cannot be merged
    for role, files in ledgers.items():
        copy_ledgers(files, answer_file(output, role))
    return report


def read_report(folder: Path, again: str = _AGAIN) -> Report:
    """The report of a finished run, in its folder or given as the file. Raises UsageError with `again` as what to do."""
    path = folder if folder.is_file() else folder / REPORT
    try:
        content = read_bounded(path, _MAX_REPORT)
    except OSError as error:
        raise UsageError(
            f"{folder} holds no finished verification: cannot read {path.name}: {reason(error)}.",
            "Finish it: the same command resumes it.",
        ) from error
    try:
        return parse_report(content)
    except ValueError as error:
        raise UsageError(f"{path} is not a report that this version reads: {error}.", again) from error


def _read_shard(folder: Path) -> Report:
    """The report of a finished run, with all the settings that a merge needs. Raises UsageError."""
    report = read_report(folder)
    try:
        _settings(report)
    except ValueError as error:
        raise UsageError(f"{folder / REPORT} is not a report that this version reads: {error}.", _AGAIN) from error
    return report


def _settings(report: Report) -> _Settings:
    """The settings of a shard. Raises ValueError whose text is what is wrong."""
    try:
        settings = _Settings.model_validate(dict(report.settings))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"settings.{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from error
    if settings.shard is not None:
        try:
            PanelShard.parse(settings.shard)
        except UsageError as error:
            raise ValueError(error.message.removesuffix(".")) from error
    if settings.panels and len(settings.panels) != len(settings.panel_sources):
        raise ValueError("settings.panels and settings.panel_sources differ in length")
    times = [report.seconds, *(stage.seconds for stage in report.stages)]
    if not all(0 <= seconds <= _LONGEST_RUN for seconds in times):
        raise ValueError(f"a stage took {max(times, key=abs):g} seconds")
    return settings


def _is_same(output: Path, folder: Path) -> bool:
    try:
        return output.samefile(folder)
    except OSError:  # the shard was read, so an output that cannot be looked at is another folder
        return False


def _check_alike(reports: Mapping[Path, Report]) -> None:
    for name, values in _conditions(reports):
        for folder, value in values.items():
            first, expected = next(iter(values.items()))
            if value != expected:
                raise UsageError(
                    f"{first} and {folder} are not shards of one verification: {name} is {expected} in one and {value} "
                    "in the other.",
                    "Verify both with the same command but for --shard.",
                )


def _conditions(reports: Mapping[Path, Report]) -> Iterable[tuple[str, dict[Path, Any]]]:
    """What must be the same in all runs; a run that scored nothing does not know the engines."""
    names = {name for report in reports.values() for name in report.settings}
    for name in sorted(names - {_SHARD}):
        yield name, {folder: report.settings.get(name) for folder, report in reports.items()}
    scored = {folder: report for folder, report in reports.items() if report.panels}
    for side in ("reference", "artefact"):
        for field in ("engine", "numbers", "sha256", "prompt_sha256"):
            yield f"{side} {field}", {folder: getattr(getattr(each, side), field) for folder, each in scored.items()}


def _check_complete(reports: dict[Path, Report]) -> None:
    whole = next((folder for folder, report in reports.items() if not report.settings.get(_SHARD)), None)
    if whole is not None:
        raise UsageError(
            f"{whole} holds a whole verification, not a shard.", f"Its verdict is final: see {whole / REPORT}."
        )
    shards = [PanelShard.parse(report.settings[_SHARD]) for report in reports.values()]
    count = shards[0].count
    # Compared by their number first: a report may claim to be one of a trillion.
    if count != len(shards) or {(each.index, each.count) for each in shards} != {(i + 1, count) for i in range(count)}:
        wanted = [f"{index}/{count}" for index in range(1, min(count, _SHARDS_SHOWN) + 1)]
        more = ["…", f"{count}/{count}"] if count > _SHARDS_SHOWN else []
        raise UsageError(
            f"The folders hold shards {', '.join(map(str, shards))}; a whole verification is "
            f"{', '.join([*wanted, *more])}.",
            "Pass the folder of each shard once.",
        )


def _case(report: Report, output: Path, access: MediaAccess) -> Case:
    settings = _settings(report)
    task = Task(settings.task)
    options = VerifyOptions(
        artefact=settings.artefact,
        reference=settings.reference,
        panels=tuple(settings.panel_sources),
        allow_outside_files=access.outside_files,
        allow_local_addresses=access.local_addresses,
        task=task,
        dtype=settings.dtype,
        limit=settings.limit,
        noise_queries=settings.noise_queries,
        output=output,
    )
    panels = load_panels(options.panels, options.limit, access) if settings.panels else []  # none: --structure-only
    for panel, sha256 in zip(panels, settings.panels, strict=True):
        if panel.sha256 != sha256:
            raise UsageError(
                f"Panel {panel.name} has changed since the shards were scored: its sha256 differs.",
                "Restore the panel, or verify all shards again.",
            )
    return Case(
        options=options,
        task=task,
        task_source=report.task_source,
        query_instruction=settings.query_instruction,
        recipe=parse_recipe(settings.recipe_text, report.recipe),
        panels=tuple(panels),
        artefact_revision=report.artefact.revision,
        reference_revision=report.reference.revision,
        undecided=tuple(settings.undecided_panels),
    )


def _ledgers(reports: Mapping[Path, Report]) -> dict[Role, list[Path]]:
    """The files of answers of each role; a shard past the first `noise_queries` has none of the reference in bf16."""
    stopped = any(not report.panels and _has_failed(report) for report in reports.values())
    if stopped or not any(report.panels for report in reports.values()):
        return {}
    has_noise = any(report.noise for report in reports.values())
    ledgers = {}
    for role in Role:
        if role is not Role.REFERENCE_BF16 or has_noise:
            ledgers[role] = [file for file in (answer_file(folder, role) for folder in reports) if file.is_file()]
            if not ledgers[role]:  # the report would be about files alone, and pass
                raise UsageError(f"No shard holds the answers of {role.value}.", "Verify the shards again.")
    return ledgers


def _has_failed(report: Report) -> bool:
    return any(stage.outcome is Outcome.FAIL for stage in report.stages)


def _scores(case: Case, role: Role, files: Sequence[Path], reports: Mapping[Path, Report]) -> RoleScores:
    scored = next(report for report in reports.values() if report.panels)
    known = read_ledgers(files, case.task)
    side = scored.artefact if role is Role.ARTEFACT else scored.reference
    try:
        return RoleScores(side, _panel_scores(case, role, known, case.panels), _seconds(role, reports.values()))
    except UnansweredError:
        for folder, report in reports.items():
            _check_answered(case, role, known, folder, PanelShard.parse(report.settings[_SHARD]))
        raise


def _seconds(role: Role, reports: Iterable[Report]) -> float:
    """How long all shards scored a role; reports count reference and artefact together, which is the artefact's here."""
    name = {Role.REFERENCE_BF16: NOISE, Role.ARTEFACT: SCORES}.get(role)
    return sum(stage.seconds for report in reports for stage in report.stages if stage.name == name)


def _check_answered(case: Case, role: Role, known: Scorer, folder: Path, shard: PanelShard) -> None:
    """Raise UsageError where a question of the shard in `folder` has no answer."""
    try:
        _panel_scores(case, role, known, [panel.shard(shard) for panel in case.panels], shard)
    except UnansweredError as error:
        raise UsageError(f"{folder} lacks answers of {role.value}. {error.message}", _AGAIN) from error


def _panel_scores(
    case: Case, role: Role, known: Scorer, panels: Sequence[Panel], shard: PanelShard | None = None
) -> tuple[PanelScores, ...]:
    asked = role_panels(case, role, panels, shard)
    return tuple(score_panel(panel, known, case.task, case.query_instruction) for panel in asked)


def _concluded(case: Case, reports: Collection[Report], scores: Mapping[Role, RoleScores]) -> Report:
    first = next(iter(reports))
    facts = RunFacts(
        seconds=round(sum(report.seconds for report in reports), 3),
        versions=first.versions,
        started=min((report.started for report in reports if report.started), default=""),
        command=first.command,
        artefact_bytes=first.artefact.nbytes,
        reference_bytes=first.reference.nbytes,
        parameters=first.reference.parameters,
        made=first.made,
    )
    found = (each for report in reports for stage in report.stages if stage.name == SCORES for each in stage.findings)
    scores = {role: replace(each, count=_count(role, reports)) for role, each in scores.items()}
    return conclude(case, _checked(reports), scores, facts, tuple(dict.fromkeys(found)))


def _count(role: Role, reports: Collection[Report]) -> AnswerCount:
    """The answers of a role in all shards together."""
    counts = [count for report in reports for count in report.answers if count.role == role.value]
    return AnswerCount(role=role.value, asked=sum(c.asked for c in counts), kept=sum(c.kept for c in counts))


def _checked(reports: Collection[Report]) -> Checked:
    """The stages that need no scores: of each, the worst that any run found; tables from the first run that has them."""
    stages: dict[str, Stage] = {}
    for stage in (stage for report in reports for stage in report.stages if stage.name not in SCORED):
        worst = stages.get(stage.name)
        if worst is None or _severity(stage.outcome) > _severity(worst.outcome):
            stages[stage.name] = stage
    return Checked(
        stages=tuple(stages.values()),
        weights=next((report.weights for report in reports if report.weights), ()),
        rederived=next((report.rederived for report in reports if report.rederived), ()),
    )


def _severity(outcome: Outcome) -> int:
    return [Outcome.SKIPPED, Outcome.PASS, Outcome.INCONCLUSIVE, Outcome.FAIL].index(outcome)
