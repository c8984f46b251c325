"""The commands that ask what data says about a model: calibrate, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.options import (
    Columns,
    Data,
    Dataset,
    Device,
    DryRunTime,
    Dtype,
    EffortChoice,
    Force,
    Json,
    Limit,
    Model,
    Recipe,
    Revision,
    TaskOption,
    Token,
    at_revision,
    check_dataset,
    require_output,
    show,
)
from qtool.errors import EXIT_GATE_FAILED


def calibrate(
    model: Model,
    *,
    data: Data = None,
    dataset: Dataset = None,
    columns: Columns = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Importance matrix to write, a GGUF file.", show_default=False),
    ] = None,
    hessians: Annotated[
        Path | None, typer.Option(help="Safetensors file to write the Hessians to.", show_default=False)
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Predict, layer by layer, the error that calibration leaves.")
    ] = False,
    hessian_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for Hessians; with less the data is read more often.")
    ] = "2GiB",
    dtype: Dtype = "float32",
    device: Device = "auto",
    limit: Limit = None,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Run a checkpoint over calibration data and keep the second moments of its inputs, for quantizing with them."""
    from qtool import api
    from qtool.calibration.calibrate import calibration_table

    check_dataset(dataset, columns)
    result = api.calibrate(
        model,
        data=data or (),
        dataset=dataset,
        columns=columns,
        output=output,
        hessians=hessians,
        predict=predict,
        limit=limit,
        hessian_memory=hessian_memory,
        task=task,
        dtype=dtype,
        device=device,
        revision=revision,
        token=token,
        force=force,
    )
    show(result, calibration_table(result), as_json=json)


def tune(
    model: Model,
    *,
    budget: Annotated[
        str | None,
        typer.Option(metavar="BITS", help="Bits per weight of the linears, such as 5.0bpw.", show_default=False),
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(metavar="X", help="Largest drift of the answers on held-out queries.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; must not exist.", show_default=False)
    ] = None,
    recipe: Recipe = "nvfp4-w4a16-calibrated",
    data: Data = None,
    dataset: Dataset = None,
    columns: Columns = None,
    limit: Limit = None,
    effort: Annotated[
        EffortChoice | None, typer.Option(help="Effort of a calibrated recipe.", show_default="the recipe's")
    ] = None,
    memory: Annotated[str, typer.Option(metavar="auto|SIZE", help="Memory that may be taken, such as 4GB.")] = "auto",
    dry_run: DryRunTime = False,
    force: Force = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Find which layers should stay unquantized, within a budget of bits or of drift, and write the recipe for it."""
    from qtool import api
    from qtool.reporting.tuning import tuning_table

    require_output(output, dry_run=dry_run)
    check_dataset(dataset, columns)
    result = api.tune(
        model,
        budget=budget,
        max_drift=max_drift,
        output=output,
        recipe=recipe,
        data=data or (),
        dataset=dataset,
        columns=columns,
        limit=limit,
        effort=effort,
        memory=memory,
        task=task,
        revision=revision,
        token=token,
        force=force,
        dry_run=dry_run,
    )
    show(result, tuning_table(result, at_revision(model, revision)), as_json=json)
    if result.measured and not result.met:
        raise typer.Exit(EXIT_GATE_FAILED)
