"""The commands around GGUF files: convert-gguf, inspect, repair-gguf."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool import console
from qtool.cli.options import (
    OUTTYPES,
    BakedInstruction,
    DryRun,
    Force,
    Json,
    Model,
    ProjectorChoice,
    PromptChoice,
    Revision,
    Stream,
    TaskChoice,
    TaskOption,
    Token,
    at_revision,
    complete_outtype,
    require_output,
    show,
)
from qtool.errors import EXIT_GATE_FAILED


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
            metavar="TYPE[,TYPE...]",
            help=f"{', '.join(OUTTYPES)}; several with commas or by repeating.",
            show_default="auto, which loses nothing",
            autocompletion=complete_outtype,
        ),
    ] = None,
    mmproj: Annotated[ProjectorChoice, typer.Option(help="Type of the vision projector.")] = "f16",
    instruction: BakedInstruction = None,
    prompt: Annotated[
        PromptChoice, typer.Option(help="Prompt of a reranker; llamacpp is what llama.cpp's own converter bakes in.")
    ] = "official",
    split_max_size: Annotated[
        str | None, typer.Option(help="Split the language file into parts of this size.", show_default=False)
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix for the K- and I-quants.", show_default=False)
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=TYPE",
            help="Type of the matrices of a K- or I-quant whose names match, such as attn_v=q6_k; may be repeated.",
            show_default=False,
        ),
    ] = None,
    tensor_type_file: Annotated[
        Path | None,
        typer.Option(help="File of such PATTERN=TYPE, as `qtool tune` writes it.", show_default=False),
    ] = None,
    stream: Stream = None,
    dry_run: DryRun = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Convert a checkpoint to GGUF files that rank and embed in llama.cpp as the original does."""
    from qtool import api
    from qtool.export.convert import conversion_table
    from qtool.export.gguf_plan import parse_outtypes

    require_output(output, dry_run=dry_run)
    summary = api.convert_gguf(
        model,
        output=output,
        outtypes=parse_outtypes(outtype),
        mmproj=mmproj,
        task=task,
        instruction=instruction,
        prompt=prompt,
        split_max_size=split_max_size,
        imatrix=imatrix,
        tensor_types=tensor_type or (),
        tensor_type_file=tensor_type_file,
        stream=stream,
        revision=revision,
        token=token,
        force=force,
        dry_run=dry_run,
    )
    show(summary, conversion_table(summary, at_revision(model, revision), output, dry_run=dry_run), as_json=json)


def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="A GGUF file, a folder, org/name, or hf://org/name[@revision][/file.gguf]."
        ),
    ],
    *,
    task: Annotated[
        TaskChoice | None, typer.Option("--task", help="What the model should be able to do.", show_default=False)
    ] = None,
    revision: Revision = None,
    token: Token = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for an undecided artefact, too.")] = False,
    json: Json = False,
) -> None:
    """Say what a GGUF file or a checkpoint is and whether it will work. From the hub, only headers are read."""
    from qtool import api

    report = api.inspect(target, task=task, revision=revision, token=token)
    show(report, report, as_json=json)
    if report.broken or (strict and report.undecided):
        raise typer.Exit(EXIT_GATE_FAILED)


def repair_gguf(
    broken: Annotated[Path, typer.Argument(metavar="BROKEN", help="A GGUF file that does not rank.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Take the rank head from this checkpoint, not from the file.", show_default=False
        ),
    ] = None,
    instruction: BakedInstruction = None,
    force: Force = False,
    task: TaskOption = None,
    json: Json = False,
) -> None:
    """Give a GGUF file the rank head, pooling and prompt that it lacks. All else stays byte for byte."""
    from rich.console import Group
    from rich.text import Text

    from qtool import api

    summary = api.repair_gguf(broken, output=output, base=base, task=task, instruction=instruction, force=force)
    show(summary, Group(*map(Text, summary.changes), console.written(output, "inspect")), as_json=json)
