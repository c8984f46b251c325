"""The command line: parse, call the function of the public API, show its result; the one place that catches errors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException

import qtool
from qtool import console
from qtool.cli import calibration, checkpoints, gguf, scoring, serving, verification
from qtool.cli.examples import epilog
from qtool.cli.typed import typed_command
from qtool.errors import EXIT_USAGE, InternalError, QtoolError, SetupError, UsageError, reason
from qtool.extras import import_failure

_NAME: Final = "qtool"
_LONGEST_SHOWN: Final = 300


class _Command(TyperCommand):
    """A command, which also takes the group's --quiet and --verbose."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own options, then the shared ones, then --help."""
        *own, help_option = super().get_params(ctx)
        shared = ctx.parent.command.params if ctx.parent else []
        return [*own, *(option for option in shared if option.name in ("quiet", "verbose")), help_option]


class _Commands(TyperGroup):
    """All commands; what typer finds wrong with a command line becomes an error of qtool's own."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Parse and run, and exit with the status unless `standalone_mode` is False."""
        console.configure()
        is_program = options.pop("standalone_mode", True)
        try:
            status = super().main(*arguments, **{**options, "prog_name": _NAME, "standalone_mode": False})
        except TyperException as error:
            context = getattr(error, "ctx", None)
            command = context.command_path if context else _NAME
            message = error.format_message().replace("Value error, ", "")  # pydantic's prefix, which typer leaves in
            raise UsageError(message, f"Run `{command} --help` for usage and examples.") from error
        if not is_program:
            return status
        sys.exit(status)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; typer would end with 1, a verdict's exit code, on an EOFError or a BrokenPipeError."""
        try:
            return super().invoke(ctx)
        except (EOFError, BrokenPipeError) as error:
            raise _as_qtool_error(error) from error
        except KeyboardInterrupt:
            console.show_status("Interrupted.")
            raise


app = typer.Typer(
    name=_NAME,
    cls=_Commands,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _set_quiet(value: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if value:
        console.configure(quiet=True, verbose=console.settings.verbose)


def _set_verbose(value: bool) -> None:  # noqa: FBT001
    if value:
        console.configure(quiet=console.settings.quiet, verbose=True)


def _show_version(value: bool) -> None:  # noqa: FBT001
    if not value:
        return
    console.show_line(qtool.__version__)
    if console.settings.verbose:
        from qtool.manifest import PARTS, versions

        parts = {name: version for name, version in versions(*PARTS).items() if name != _NAME}
        console.show_lines(f"{name} {version or '(not installed)'}" for name, version in parts.items())
    raise typer.Exit


@app.callback(epilog="Run `qtool COMMAND --help` for the options and examples of a command.\n\nDocs: docs/index.md")
def root(
    ctx: typer.Context,
    *,
    quiet: Annotated[  # noqa: ARG001 - its callback acts
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Print results and errors only.",
            callback=_set_quiet,
            is_eager=True,
            expose_value=False,
        ),
    ] = False,
    verbose: Annotated[  # noqa: ARG001
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Print details, messages of libraries, and tracebacks.",
            callback=_set_verbose,
            is_eager=True,
            expose_value=False,
        ),
    ] = False,
    version: Annotated[  # noqa: ARG001
        bool,
        typer.Option("--version", help="Print the version; with -v also those of libraries.", callback=_show_version),
    ] = False,
) -> None:
    """Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(EXIT_USAGE)


_COMMANDS: Final[Mapping[str, Callable[..., None]]] = {
    "quantize": checkpoints.quantize,
    "calibrate": calibration.calibrate,
    "tune": calibration.tune,
    "convert-gguf": gguf.convert_gguf,
    "inspect": gguf.inspect,
    "repair-gguf": gguf.repair_gguf,
    "score": scoring.score,
    "embed": scoring.embed,
    "verify": verification.verify,
    "merge-reports": verification.merge_reports,
    "compare": verification.compare,
    "serve-command": serving.serve_command,
    "demo": checkpoints.demo,
    "recipes": checkpoints.recipes,
    "doctor": checkpoints.doctor,
}
for _name, _function in _COMMANDS.items():
    app.command(_name, cls=_Command, epilog=epilog(_name))(_function)


def main() -> None:
    """Run the command line; exits with the documented code."""
    console.settings.command = typed_command(sys.argv[1:])
    logging.captureWarnings(capture=True)  # Python prints warnings, which may quote a stranger, by itself
    try:
        app()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic in Rust too; left alone it would end with the 1 of a verdict
        shown = error if isinstance(error, QtoolError) else _as_qtool_error(error)
        console.show_error(shown, as_json="--json" in sys.argv[1:])
        sys.exit(shown.exit_code)


def _as_qtool_error(error: BaseException) -> QtoolError:
    """An exception that the library did not expect, as an error that can be shown; the exception is its cause."""
    shown = _machine_error(error) or InternalError(
        f"qtool itself failed: {type(error).__name__}: {_one_line(error)}", "Set QTOOL_DEBUG=1 for the traceback."
    )
    shown.__cause__ = error
    return shown


def _machine_error(error: BaseException) -> SetupError | None:
    if isinstance(error, MemoryError):
        return SetupError("There is not enough memory.", "Close other programs, or process less at once.")
    # By its name, since importing torch only to compare classes takes seconds.
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return SetupError(
            f"There is not enough GPU memory: {_one_line(error)}",
            "Close other programs on the GPU, process less at once, or use --device cpu.",
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("qtool"):
        return import_failure(error)
    if isinstance(error, OSError):
        what = f"{error.filename}: {reason(error)}." if error.filename else _one_line(error)
        return SetupError(f"The system refused: {what}", "Set QTOOL_DEBUG=1 for the traceback.")
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join((reason(error) if isinstance(error, OSError) else str(error)).split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
