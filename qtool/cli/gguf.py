"""The commands around GGUF files: convert-gguf, inspect, repair-gguf.

Rule: no work happens here, and heavy imports wait until a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool import console
from qtool.cli.options import (
    DryRun,
    Force,
    Instruction,
    Json,
    Model,
    Revision,
    TaskOption,
    Token,
    parse_size,
    parse_task,
    show,
)
from qtool.errors import EXIT_GATE_FAILED, UsageError


def convert_gguf(
    model: Model,
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder, or a file ending in .gguf; must not exist.", show_default=False),
    ] = None,
    outtype: Annotated[
        list[str] | None,
        typer.Option(
            help="auto (what loses nothing), f32, f16, bf16, q8_0, nvfp4, q6_k, q5_k_m, q4_k_m, iq4_xs; several with "
            "commas or by repeating.",
            show_default="auto",
        ),
    ] = None,
    mmproj: Annotated[str, typer.Option(help="Type of the vision projector: f32, f16, bf16, q8_0 or none.")] = "f16",
    instruction: Instruction = None,
    prompt: Annotated[
        str, typer.Option(help="official, or llamacpp: what llama.cpp's own converter bakes into every reranker.")
    ] = "official",
    split_max_size: Annotated[
        str | None, typer.Option(help="Split the language file into parts of this size.", show_default=False)
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix for the K- and I-quants.", show_default=False)
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Convert a checkpoint to GGUF files that rank and embed in llama.cpp as the original does."""
    from qtool.export.convert import conversion_table
    from qtool.export.convert import convert_gguf as run
    from qtool.export.gguf_plan import ConvertOptions, parse_outtypes, parse_prompt

    if output is None and not dry_run:
        raise UsageError("Nowhere to write to.", "Pass --output FOLDER, --output FILE.gguf, or --dry-run.")
    options = ConvertOptions(
        model, output, parse_outtypes(outtype), mmproj, parse_task(task), instruction, parse_prompt(prompt),
        parse_size(split_max_size) if split_max_size else None, imatrix, revision, token, force, dry_run,
    )  # fmt: skip
    with console.byte_bar("Converting") as progress:
        summary = run(options, progress)
    show(summary.to_json(), conversion_table(summary, output, dry_run=dry_run), as_json=json)


def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A GGUF file, a folder, org/name, or hf://org/name[@revision][/file.gguf]."
        ),
    ],
    *,
    task: Annotated[
        str | None, typer.Option("--task", help="rerank or embed: what it should be able to do.", show_default=False)
    ] = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Say what a GGUF file or a checkpoint is and whether it will work; of what lies on the hub, only headers are read."""
    from qtool.checks.inspect import inspect as run

    with console.stage_bar("files") as progress:
        report = run(target, parse_task(task), revision, token, progress)
    show(report.to_json(), report, as_json=json)
    if report.broken:
        raise typer.Exit(EXIT_GATE_FAILED)


def repair_gguf(
    broken: Annotated[Path, typer.Argument(help="A GGUF file that does not rank.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Take the rank head from this checkpoint, not from the file.", show_default=False
        ),
    ] = None,
    instruction: Instruction = None,
    force: Force = False,
    task: TaskOption = None,
    json: Json = False,
) -> None:
    """Give a GGUF file the rank head, pooling and prompt that it lacks; all else stays byte for byte."""
    from rich.console import Group
    from rich.text import Text

    from qtool.export.repair import RepairOptions
    from qtool.export.repair import repair_gguf as run

    with console.byte_bar("Repairing") as progress:
        summary = run(RepairOptions(broken, output, base, parse_task(task), instruction, force), progress)
    for_people = Group(*map(Text, summary.changes), console.written(output, "inspect"))
    show(summary.to_json(), for_people, as_json=json)
