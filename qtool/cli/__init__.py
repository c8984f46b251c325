"""The command line: parse, hand over to a `run` function, show what it returns.

Rule: no work happens here, heavy imports wait until a command runs, and this is the one place that catches errors.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from qtool import console
from qtool.cli import checkpoints, gguf, scoring, serving, verification
from qtool.errors import QtoolError

app = typer.Typer(
    name="qtool",
    help="Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if value:
        from importlib.metadata import version

        typer.echo(version("qtool"))
        raise typer.Exit


@app.callback()
def root(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders."""


app.command()(checkpoints.quantize)
app.command("convert-gguf")(gguf.convert_gguf)
app.command()(gguf.inspect)
app.command("repair-gguf")(gguf.repair_gguf)
app.command()(scoring.score)
app.command()(scoring.embed)
app.command()(verification.verify)
app.command("merge-reports")(verification.merge_reports)
app.command("serve-command")(serving.serve_command)
app.command()(checkpoints.demo)
app.command()(checkpoints.recipes)
app.command()(checkpoints.doctor)


def main() -> None:
    """Run the command line; exits with the documented code."""
    try:
        app()  # typer itself ends with 2 on a wrong command line and with 130 on Ctrl-C
    except QtoolError as error:
        console.show_error(error, debug=os.environ.get("QTOOL_DEBUG") == "1")
        sys.exit(error.exit_code)
