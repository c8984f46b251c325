"""The command around servers: serve-command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool import console
from qtool.cli.options import Json, Mmproj, Revision, ServingChoice, TaskOption, Token


def serve_command(
    artefact: Annotated[
        str, typer.Argument(metavar="ARTEFACT", help="A folder, a GGUF file, org/name or hf://org/name/file.gguf.")
    ],
    *,
    engine: Annotated[ServingChoice, typer.Option(help="What serves it.")],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to serve on.", show_default="the engine's own")
    ] = None,
    write_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the official chat template of a reranker that lacks it.", show_default=False
        ),
    ] = None,
    mmproj: Mmproj = None,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Print the command that serves an artefact as qtool scores it, chat template included."""
    from qtool.arch.spec import Task
    from qtool.artefact import open_artefact
    from qtool.serve_command import parse_engine, with_template
    from qtool.serve_command import serve_command as run

    asked = Task(task) if task else None
    opened = open_artefact(artefact, task=asked, mmproj=mmproj, revision=revision, token=token)
    command = run(opened, parse_engine(engine), port, asked, write_template)
    command = with_template(command, write=write_template is not None)
    if json:
        console.show_json(command.to_json())
        return
    for note in command.notes:
        console.show_status(note)
    console.show_line(command.line)
