"""The commands that compare: verify, merge-reports.

Rule: no work happens here, and heavy imports wait until a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool import console
from qtool.cli.options import (
    Columns,
    Concurrency,
    Dataset,
    Engine,
    Force,
    Json,
    Limit,
    Mmproj,
    Revision,
    ServedModel,
    ShardOption,
    TaskOption,
    Token,
    parse_panels,
    parse_task,
    show,
)
from qtool.errors import EXIT_GATE_FAILED

if TYPE_CHECKING:
    from qtool.verify.report import Report

Strict = Annotated[bool, typer.Option("--strict", help="Exit 1 when the verdict is inconclusive, too.")]


def verify(
    artefact: Annotated[
        str, typer.Argument(metavar="ARTEFACT", help="A folder, a GGUF file, org/name, or the URL of a running server.")
    ],
    *,
    reference: Annotated[str, typer.Option(metavar="MODEL", help="What it was made from.")],
    panel: Annotated[
        list[str] | None, typer.Option(help="A JSONL file or a built-in panel; may be repeated.", show_default=False)
    ] = None,
    dataset: Dataset = None,
    columns: Columns = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the reports and for every answer as it comes; an interrupted run goes on.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Take the gates from here instead of the artefact's own recipe.", show_default=False),
    ] = None,
    limit: Limit = None,
    shard: ShardOption = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    mmproj: Mmproj = None,
    structure_only: Annotated[bool, typer.Option("--structure-only", help="Look at headers and stop.")] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Compare each dequantized weight with its source.")
    ] = False,
    rederive: Annotated[
        bool, typer.Option("--rederive", help="Make the artefact again by its own recipe and compare the bytes.")
    ] = False,
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
    timeout: Annotated[float, typer.Option(min=1, help="Of a server: seconds for each request.")] = 300.0,
    strict: Strict = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Prove that an artefact scores as its reference does: structure, prompt, scores, ranking, verdict."""
    from qtool.checks.findings import printable
    from qtool.inputs.panels import PanelShard
    from qtool.reporting.run import verify as run
    from qtool.verify.case import VerifyOptions

    options = VerifyOptions(
        artefact=artefact,
        reference=reference,
        panels=parse_panels(panel or (), dataset, columns),
        task=parse_task(task),
        recipe=recipe,
        dtype=dtype,
        limit=limit,
        shard=PanelShard.parse(shard) if shard else None,
        mmproj=mmproj,
        revision=revision,
        token=token,
        engine=engine,
        served_model=served_model,
        concurrency=concurrency,
        timeout=timeout,
        structure_only=structure_only,
        weights=weights,
        rederive=rederive,
        keep_going=keep_going,
        noise_queries=noise_queries,
        use_cache=cache,
        output=output,
        force=force,
    )
    with console.stage_bar("items") as progress:
        report = run(options, progress, status=lambda line: console.show_status(printable(line)))
    _finish(report, strict=strict, as_json=json)


def merge_reports(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="The folders of all shards.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the joined answers and reports.")],
    strict: Strict = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Join what `verify --shard` scored on several machines and judge it as one verification."""
    from qtool.reporting.run import merge_reports as run

    _finish(run(folders, output, force=force), strict=strict, as_json=json)


def _finish(report: Report, *, strict: bool, as_json: bool) -> None:
    from qtool.reporting.console import render_console
    from qtool.verify.gates import Verdict

    show(report.to_dict(), render_console(report), as_json=as_json)
    failing = {Verdict.FAIL, Verdict.INCONCLUSIVE} if strict else {Verdict.FAIL}
    if report.verdict in failing:
        raise typer.Exit(EXIT_GATE_FAILED)
