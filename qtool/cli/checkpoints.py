"""The commands that make checkpoints and show what there is: quantize, demo, recipes, doctor.

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
    Json,
    Model,
    Revision,
    TaskOption,
    Token,
    parse_backend,
    parse_size,
    parse_task,
    show,
)
from qtool.errors import EXIT_GATE_FAILED, EXIT_SETUP, UsageError


def quantize(
    model: Model,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist.", show_default=False)
    ] = None,
    recipe: Annotated[str, typer.Option(help="Name of a built-in recipe, or a file of your own.")] = "nvfp4-w4a16",
    backend: Annotated[str, typer.Option(help="auto, streaming or modelopt.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 5GB.")] = "512MiB",
    dry_run: DryRun = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Quantize a checkpoint to NVFP4 W4A16 by a recipe."""
    from qtool.export.quantize import QuantizeOptions, quantization_table
    from qtool.export.quantize import quantize as run

    if output is None and not dry_run:
        raise UsageError("Nowhere to write to.", "Pass --output FOLDER, or --dry-run.")
    options = QuantizeOptions(
        model, output, recipe, parse_backend(backend), parse_task(task), revision, token,
        parse_size(max_shard_size), force, dry_run,
    )  # fmt: skip
    with console.byte_bar("Quantizing") as progress:
        summary = run(options, progress)
    show(summary.to_json(), quantization_table(summary, output, dry_run=dry_run), as_json=json)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.", show_default=False)] = None,
    *,
    json: Json = False,
) -> None:
    """List the built-in recipes, or show one."""
    from rich.table import Table

    from qtool.recipe import builtin_recipes, load_recipe

    loaded = [load_recipe(each) for each in ([name] if name else builtin_recipes())]
    table = Table("recipe", "scheme", "what it does", box=None, pad_edge=False)
    for each in loaded:
        table.add_row(each.recipe.name, each.recipe.scheme, each.recipe.description)
    data = {"schema_version": 1, "recipes": [{**each.recipe.model_dump(), "sha256": each.sha256} for each in loaded]}
    if name and not json:
        console.show_line(loaded[0].text.rstrip())  # to start one's own from
    else:
        show(data, table, as_json=json)


def doctor(*, json: Json = False) -> None:
    """Check this machine: versions, devices, engines, disk, hub access."""
    from qtool.doctor import diagnoses_table, examine, is_healthy

    findings = examine()
    show(
        {"schema_version": 1, "findings": [finding.to_json() for finding in findings]},
        diagnoses_table(findings),
        as_json=json,
    )
    if not is_healthy(findings):
        raise typer.Exit(EXIT_SETUP)


def demo(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the quantized demo models.")] = Path(
        "demo-out"
    ),
    json: Json = False,
) -> None:
    """Quantize the built-in reranker and embedder and verify them: the whole job in about two minutes."""
    from qtool.demo.showcase import showcase

    with console.stage_bar("items") as progress:
        result = showcase(output, console.show_status, progress)
    show(result.to_json(), result, as_json=json)
    if not result.passed:
        raise typer.Exit(EXIT_GATE_FAILED)
