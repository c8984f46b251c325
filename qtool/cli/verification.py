"""The commands that compare: verify, merge-reports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool import console
from qtool.cli.options import (
    PANELS,
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
    Revision,
    ServedModel,
    ShardOption,
    TaskOption,
    Timeout,
    Token,
    check_dataset,
    complete_panel,
    complete_recipe,
    show,
)
from qtool.errors import EXIT_GATE_FAILED

if TYPE_CHECKING:
    from qtool.verify.report import Report

Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 for an inconclusive verdict, too.")]


def verify(
    artefact: Annotated[
        str, typer.Argument(metavar="ARTEFACT", help="A folder, a GGUF file, org/name, or the URL of a running server.")
    ],
    *,
    reference: Annotated[str, typer.Option(metavar="MODEL", help="The checkpoint that it was made from.")],
    panel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help=f"Built-in panel ({PANELS}) or a JSONL file; may be repeated.",
            show_default="the demo panels",
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
    dtype: Dtype = "float32",
    device: Device = "auto",
    memory: MemoryOption = "auto",
    mmproj: Mmproj = None,
    structure_only: Annotated[bool, typer.Option("--structure-only", help="Check headers and stop.")] = False,
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
    timeout: Timeout = 300.0,
    strict: Strict = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Prove that an artefact scores as its reference does. Checks structure, prompt, scores and ranking."""
    from qtool import api

    check_dataset(dataset, columns)
    report = api.verify(
        artefact,
        reference=reference,
        panels=panel or (),
        dataset=dataset,
        columns=columns,
        output=output,
        recipe=recipe,
        limit=limit,
        shard=shard,
        task=task,
        dtype=dtype,
        device=device,
        memory=memory,
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
        force=force,
    )
    _finish(report, output, strict=strict, as_json=json)


def merge_reports(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="The folders of all shards.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the joined answers and reports.")],
    strict: Strict = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Join what `verify --shard` scored on several machines and judge it as one verification."""
    from qtool import api

    _finish(api.merge_reports(folders, output=output, force=force), output, strict=strict, as_json=json)


def _finish(report: Report, output: Path | None, *, strict: bool, as_json: bool) -> None:
    from rich.console import Group

    from qtool.reporting.console import render_console
    from qtool.verify.gates import Verdict

    where = [console.unwrapped(f"Report: {output / 'report.html'}")] if output else []
    show(report, Group(render_console(report), *where), as_json=as_json)
    failing = {Verdict.FAIL, Verdict.INCONCLUSIVE} if strict else {Verdict.FAIL}
    if report.verdict in failing:
        raise typer.Exit(EXIT_GATE_FAILED)
