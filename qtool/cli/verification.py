"""The commands that compare: verify, merge-reports, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool import console
from qtool.cli.options import (
    PANELS,
    AllowLocalAddresses,
    AllowOutsideFiles,
    Columns,
    Concurrency,
    Dataset,
    Device,
    Dtype,
    Engine,
    Force,
    Json,
    Limit,
    MemoryOption,
    Mmproj,
    ServedModel,
    ShardOption,
    TaskOption,
    Timeout,
    Token,
    check_dataset,
    complete_calibration,
    complete_metric,
    complete_panel,
    complete_recipe,
    show,
)
from qtool.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, EXIT_PASS

if TYPE_CHECKING:
    from qtool.verify.gates import Verdict
    from qtool.verify.report import Report

Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 instead of 6 for an inconclusive verdict.")]


def verify(
    artefact: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTEFACT...",
            help="A folder, a GGUF file, org/name, hf://org/name/file.gguf, or a server's URL; one or several.",
        ),
    ],
    *,
    reference: Annotated[str, typer.Option(metavar="MODEL", help="The checkpoint that it was made from.")],
    panel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help=f"Built-in panel ({PANELS}) or a JSONL file; may be repeated.",
            show_default="real texts, pages and charts",
            autocompletion=complete_panel,
        ),
    ] = None,
    dataset: Dataset = None,
    columns: Columns = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the reports and for every answer; an interrupted run continues.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Take the gates from this recipe.",
            show_default="the artefact's own",
            autocompletion=complete_recipe,
        ),
    ] = None,
    limit: Limit = None,
    shard: ShardOption = None,
    allow_outside_files: AllowOutsideFiles = False,
    allow_local_addresses: AllowLocalAddresses = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    memory: MemoryOption = "auto",
    mmproj: Mmproj = None,
    structure_only: Annotated[
        bool, typer.Option("--structure-only", help="Check headers and stop; downloads no weights.")
    ] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Compare each dequantized weight with its source; needs all weights.")
    ] = False,
    rederive: Annotated[
        bool,
        typer.Option(
            "--rederive", help="Make the artefact again by its own recipe and compare the bytes; needs all weights."
        ),
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME|FILE",
            help="What calibrated weights were fitted to, for --rederive; recognised by its hash, as --dataset is.",
            show_default="what comes with qtool",
            autocompletion=complete_calibration,
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Score even what an earlier stage found broken.")
    ] = False,
    noise_queries: Annotated[
        int, typer.Option(min=0, help="Queries of each panel that the reference also answers in bf16.")
    ] = 20,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep answers for later runs, and use them.")
    ] = True,
    engine: Engine = None,
    served_model: ServedModel = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    strict: Strict = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the artefact on the hub.", show_default=False)
    ] = None,
    reference_revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the reference on the hub.", show_default=False)
    ] = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Prove that an artefact scores as its reference does. Checks structure, prompt, scores and ranking."""
    from qtool import api
    from qtool.reporting.several import render_reports

    check_dataset(dataset, columns)
    reports = api.verify_all(
        artefact,
        reference=reference,
        panels=panel or (),
        dataset=dataset,
        columns=columns,
        output=output,
        recipe=recipe,
        limit=limit,
        shard=shard,
        allow_outside_files=allow_outside_files,
        allow_local_addresses=allow_local_addresses,
        task=task,
        dtype=dtype,
        device=device,
        memory=memory,
        mmproj=mmproj,
        revision=revision,
        reference_revision=reference_revision,
        token=token,
        engine=engine,
        served_model=served_model,
        concurrency=concurrency,
        timeout=timeout,
        structure_only=structure_only,
        weights=weights,
        rederive=rederive,
        data=data or (),
        keep_going=keep_going,
        noise_queries=noise_queries,
        use_cache=cache,
        force=force,
    )
    if len(reports.artefacts) == 1:
        _finish(reports.reports[0], output, strict=strict, as_json=json)
        return
    show(reports, render_reports(reports, output), as_json=json)
    code = _exit_code(reports.verdict, strict=strict)
    errors = [error.exit_code for error in reports.errors]
    raise typer.Exit(code if code == EXIT_GATE_FAILED or not errors else errors[0])


def merge_reports(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="The folders of all shards.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the joined answers and reports.")],
    allow_outside_files: AllowOutsideFiles = False,
    allow_local_addresses: AllowLocalAddresses = False,
    strict: Strict = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Join what `verify --shard` scored on several machines and judge it as one verification."""
    from qtool import api

    report = api.merge_reports(
        folders,
        output=output,
        allow_outside_files=allow_outside_files,
        allow_local_addresses=allow_local_addresses,
        force=force,
    )
    _finish(report, output, strict=strict, as_json=json)


def compare(
    reports: Annotated[
        list[Path],
        typer.Argument(
            metavar="REPORT...",
            help="Folders that verify has written, of one or several artefacts, or their report.json; shards of one run "
            "are one artefact.",
        ),
    ],
    *,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="REPORT", help="The report that the others are held against.", show_default="the first"),
    ] = None,
    fail_if_worse: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC",
            help="Exit with 1 if an artefact is worse than the baseline in this metric, by its whole interval, on any "
            "panel; may be repeated.",
            autocompletion=complete_metric,
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for compare.html and compare.json.", show_default=False),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Put artefacts of one reference side by side: their drift, and what differs on the same queries."""
    from qtool import api
    from qtool.reporting.comparison import render_console

    comparison = api.compare(reports, baseline=baseline, fail_if_worse=fail_if_worse or (), output=output, force=force)
    show(comparison, render_console(comparison, output), as_json=json)
    if not comparison.passed:
        raise typer.Exit(EXIT_GATE_FAILED)


def _finish(report: Report, output: Path | None, *, strict: bool, as_json: bool) -> None:
    from rich.console import Group

    from qtool.reporting.console import render_console

    where = [console.unwrapped(f"Report: {output / 'report.html'}")] if output else []
    show(report, Group(render_console(report), *where), as_json=as_json)
    raise typer.Exit(_exit_code(report.verdict, strict=strict))


def _exit_code(verdict: Verdict | None, *, strict: bool) -> int:
    from qtool.verify.gates import Verdict

    if verdict is Verdict.INCONCLUSIVE:
        return EXIT_GATE_FAILED if strict else EXIT_INCONCLUSIVE
    return EXIT_GATE_FAILED if verdict is Verdict.FAIL else EXIT_PASS
