"""The command line: parse, hand over to a `run` function, show what it returns.

Rule: no work happens here, heavy imports wait until a command runs, and this is the one place that catches errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool import console
from qtool.arguments import parse_backend, parse_size, parse_task
from qtool.errors import EXIT_GATE_FAILED, QtoolError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    name="qtool",
    help="Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, org/name, hf://org/name@revision, or a built-in demo model.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)]
Token = Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Hub access token.", show_default=False)]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="rerank or embed; overrides what the checkpoint declares.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output that qtool made.")]


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


@app.command()
def quantize(
    model: Model,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist.", show_default=False)
    ] = None,
    recipe: Annotated[str, typer.Option(help="Name of a built-in recipe, or a file of your own.")] = "nvfp4-w4a16",
    backend: Annotated[str, typer.Option(help="auto, streaming or modelopt.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 5GB.")] = "512MiB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, to the byte, and stop.")] = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Quantize a checkpoint to NVFP4 W4A16 by a recipe."""
    from qtool.quantization.job import QuantizeOptions
    from qtool.quantization.present import summary_table
    from qtool.quantization.run import quantize as run

    if output is None and not dry_run:
        raise UsageError("Nowhere to write to.", "Pass --output FOLDER, or --dry-run.")
    options = QuantizeOptions(
        model, output, recipe, parse_backend(backend), parse_task(task), revision, token,
        parse_size(max_shard_size), force, dry_run,
    )  # fmt: skip
    with console.byte_bar("Quantizing") as progress:
        summary = run(options, progress)
    _show(summary.to_json(), summary_table(summary, output, dry_run=dry_run), as_json=json)


@app.command("convert-gguf")
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
    instruction: Annotated[
        str | None,
        typer.Option(help="Bake this instruction into a reranker's prompt.", show_default="the official one"),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="official, or llamacpp: what llama.cpp's own converter bakes into every reranker.")
    ] = "official",
    split_max_size: Annotated[
        str | None, typer.Option(help="Split the language file into parts of this size.", show_default=False)
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance matrix for the K- and I-quants.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, to the byte, and stop.")
    ] = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Convert a checkpoint to GGUF files that rank and embed in llama.cpp as the original does."""
    from qtool.convert.options import ConvertOptions, parse_outtypes, parse_prompt
    from qtool.convert.run import convert_gguf as run
    from qtool.convert.summary import summary_table

    if output is None and not dry_run:
        raise UsageError("Nowhere to write to.", "Pass --output FOLDER, --output FILE.gguf, or --dry-run.")
    options = ConvertOptions(
        model, output, parse_outtypes(outtype), mmproj, parse_task(task), instruction, parse_prompt(prompt),
        parse_size(split_max_size) if split_max_size else None, imatrix, revision, token, force, dry_run,
    )  # fmt: skip
    with console.byte_bar("Converting") as progress:
        summary = run(options, progress)
    _show(summary.to_json(), summary_table(summary, output, dry_run=dry_run), as_json=json)


@app.command("repair-gguf")
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
    instruction: Annotated[
        str | None, typer.Option(help="Bake this instruction into the prompt.", show_default="the official one")
    ] = None,
    force: Force = False,
    task: TaskOption = None,
    json: Json = False,
) -> None:
    """Give a GGUF file the rank head, pooling and prompt that it lacks; all else stays byte for byte."""
    from rich.console import Group

    from qtool.convert.repair import RepairOptions
    from qtool.convert.repair import repair_gguf as run

    with console.byte_bar("Repairing") as progress:
        summary = run(RepairOptions(broken, output, base, parse_task(task), instruction, force), progress)
    _show(summary.to_json(), Group(*summary.changes, f"Wrote {output}. Next: qtool inspect {output}"), as_json=json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.", show_default=False)] = None,
    *,
    json: Json = False,
) -> None:
    """List the built-in recipes, or show one."""
    from rich.table import Table
    from rich.text import Text

    from qtool.recipe import builtin_recipes, load_recipe

    loaded = [load_recipe(each) for each in ([name] if name else builtin_recipes())]
    table = Table("recipe", "scheme", "what it does", box=None, pad_edge=False)
    for each in loaded:
        table.add_row(each.recipe.name, each.recipe.scheme, each.recipe.description)
    data = {"schema_version": 1, "recipes": [{**each.recipe.model_dump(), "sha256": each.sha256} for each in loaded]}
    _show(data, Text(loaded[0].text.rstrip()) if name else table, as_json=json)


@app.command()
def doctor(*, json: Json = False) -> None:
    """Check this machine: versions, devices, engines, disk, hub access."""
    from qtool.doctor import examine, findings_table

    findings = examine()
    _show(
        {"schema_version": 1, "findings": [finding.to_json() for finding in findings]},
        findings_table(findings),
        as_json=json,
    )


@app.command()
def verify(
    artefact: Annotated[Path, typer.Argument(help="The quantized model: a folder.")],
    *,
    reference: Annotated[str, typer.Option(metavar="MODEL", help="What it was made from.")],
    panel: Annotated[
        list[str] | None, typer.Option(help="A JSONL file or a built-in panel; may be repeated.", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Take the gates from here instead of the artefact's own recipe.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Score only the first N queries of each panel.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Score an artefact and its reference on the same panels and judge the difference."""
    from qtool.checkpoint.source import resolve
    from qtool.verification.run import VerifyOptions
    from qtool.verification.run import verify as run

    source = resolve(reference, revision, token)
    options = VerifyOptions(
        artefact, source.directory, tuple(panel or ()), parse_task(task), recipe, dtype, limit=limit
    )
    with console.stage_bar("items") as progress:
        report = run(options, progress)
    _show(report.to_dict(), report, as_json=json)
    if not report.passed:
        raise typer.Exit(EXIT_GATE_FAILED)


@app.command()
def demo(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the quantized demo models.")] = Path(
        "demo-out"
    ),
    json: Json = False,
) -> None:
    """Quantize the built-in reranker and embedder and verify them: the whole job in a minute or two."""
    from qtool.demo.showcase import showcase

    with console.stage_bar("items") as progress:
        result = showcase(output, console.show_status, progress)
    _show(result.to_json(), result, as_json=json)
    if not result.passed:
        raise typer.Exit(EXIT_GATE_FAILED)


def _show(data: Mapping[str, Any], for_people: RenderableType, *, as_json: bool) -> None:
    if as_json:
        console.show_json(data)
    else:
        console.show_result(for_people)


def main() -> None:
    """Run the command line; exits with the documented code."""
    try:
        app()  # typer itself ends with 2 on a wrong command line and with 130 on Ctrl-C
    except QtoolError as error:
        console.show_error(error, debug=os.environ.get("QTOOL_DEBUG") == "1")
        sys.exit(error.exit_code)
