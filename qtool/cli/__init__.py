"""The command line: parse, hand over to a `run` function, show what it returns.

Rule: no work happens here, heavy imports wait until a command runs, and this is the one place that catches errors.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

import qtool
from qtool import console
from qtool.cli import checkpoints, gguf, scoring, serving, verification
from qtool.errors import InternalError, QtoolError, SetupError
from qtool.extras import import_failure

_SHOWN: Final = 300


class _Commands(TyperGroup):
    """The commands; typer would end with 1 where one raises what it takes for its reader's leaving, and silently on Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run the one that was asked for."""
        try:
            return super().invoke(ctx)
        except (EOFError, BrokenPipeError) as error:
            raise _told(error) from error
        except KeyboardInterrupt:
            console.show_status("Interrupted.")
            raise


app = typer.Typer(
    name="qtool",
    cls=_Commands,
    help="Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if value:
        typer.echo(qtool.__version__)
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
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic in Rust too; left alone it would end with the 1 of a verdict
        told = error if isinstance(error, QtoolError) else _told(error)
        console.show_error(told, debug=os.environ.get("QTOOL_DEBUG") == "1")
        sys.exit(told.exit_code)


def _told(error: BaseException) -> QtoolError:
    """What the library did not foresee, as an error that can be shown; the exception is its cause."""
    told = _of_the_machine(error) or InternalError(
        f"qtool itself failed: {type(error).__name__}: {_one_line(error)}", "Set QTOOL_DEBUG=1 for the traceback."
    )
    told.__cause__ = error
    return told


def _of_the_machine(error: BaseException) -> SetupError | None:
    if isinstance(error, MemoryError):
        return SetupError("There is not enough memory.", "End other programs, or ask for less at once.")
    # By its name, since importing torch only to compare classes takes seconds.
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return SetupError(
            f"There is not enough GPU memory: {_one_line(error)}",
            "End other programs on the GPU, ask for less at once, or use --device cpu.",
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("qtool"):
        return import_failure(error)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}." if error.filename and error.strerror else _one_line(error)
        return SetupError(f"The system refused: {what}", "Set QTOOL_DEBUG=1 for the traceback.")
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
