"""The commands that make checkpoints and describe the installation: quantize, demo, recipes, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool import console
from qtool.cli.options import (
    BackendChoice,
    Columns,
    Data,
    Dataset,
    Device,
    DryRun,
    EffortChoice,
    Force,
    Json,
    Limit,
    Model,
    Recipe,
    Revision,
    Stream,
    TaskOption,
    Token,
    at_revision,
    check_dataset,
    complete_recipe,
    require_output,
    show,
)
from qtool.errors import EXIT_GATE_FAILED, EXIT_SETUP
from qtool.resources import DEFAULT_RECIPE


def quantize(
    model: Model,
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist.", show_default=False)
    ] = None,
    recipe: Recipe = DEFAULT_RECIPE,
    backend: Annotated[BackendChoice, typer.Option(help="What quantizes; both write the same bytes.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 5GB.")] = "512MiB",
    stream: Stream = None,
    data: Data = None,
    dataset: Dataset = None,
    columns: Columns = None,
    limit: Limit = None,
    effort: Annotated[
        EffortChoice | None, typer.Option(help="Effort of a calibrated recipe.", show_default="the recipe's")
    ] = None,
    memory: Annotated[
        str, typer.Option(metavar="auto|SIZE", help="Memory that a calibrated recipe may take, such as 4GB.")
    ] = "auto",
    device: Device = "auto",
    dry_run: DryRun = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Quantize a checkpoint to NVFP4 W4A16 by a recipe."""
    from qtool import api
    from qtool.export.quantize import quantization_table

    require_output(output, dry_run=dry_run)
    check_dataset(dataset, columns)
    summary = api.quantize(
        model,
        output=output,
        recipe=recipe,
        backend=backend,
        task=task,
        revision=revision,
        token=token,
        max_shard_size=max_shard_size,
        stream=stream,
        data=tuple(data or ()),
        dataset=dataset,
        columns=columns,
        limit=limit,
        effort=effort,
        memory=memory,
        device=device,
        force=force,
        dry_run=dry_run,
    )
    show(summary, quantization_table(summary, at_revision(model, revision), output, dry_run=dry_run), as_json=json)


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="Show this recipe in full.", autocompletion=complete_recipe, show_default=False),
    ] = None,
    *,
    json: Json = False,
) -> None:
    """List the built-in recipes, or show one."""
    from rich.table import Table

    from qtool.recipe import builtin_recipes, load_recipe

    loaded = [load_recipe(each) for each in ([name] if name else builtin_recipes())]
    if json:
        recipes = [{**each.recipe.model_dump(), "sha256": each.sha256} for each in loaded]
        console.show_json({"schema_version": 1, "recipes": recipes})
    elif name:
        console.show_line(loaded[0].text.rstrip())  # to start a recipe of one's own from
    else:
        table = Table("recipe", "scheme", "what it does", box=None, pad_edge=False)
        for each in loaded:
            table.add_row(each.recipe.name, each.recipe.scheme, each.recipe.description)
        console.show_result(table)


def doctor(*, json: Json = False) -> None:
    """Check this machine: versions, devices, engines, disk, hub access."""
    from qtool.doctor import diagnoses_table, examine, is_healthy

    findings = examine()
    if json:
        console.show_json({"schema_version": 1, "findings": [finding.to_json() for finding in findings]})
    else:
        console.show_result(diagnoses_table(findings))
    if not is_healthy(findings):
        raise typer.Exit(EXIT_SETUP)


def demo(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the quantized demo models and their reports.")
    ] = Path("demo-out"),
    json: Json = False,
) -> None:
    """Quantize the built-in models and verify them: the whole job in about two minutes."""
    from qtool.demo.showcase import showcase

    result = showcase(output, console.show_status)
    show(result, result.details() if console.settings.verbose else result.summary(), as_json=json)
    if not result.passed:
        raise typer.Exit(EXIT_GATE_FAILED)
