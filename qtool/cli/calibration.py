"""The command that asks what data says about a model's inputs: calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.options import (
    Columns,
    Data,
    Dataset,
    Device,
    Dtype,
    Force,
    Json,
    Limit,
    Model,
    Revision,
    TaskOption,
    Token,
    check_dataset,
    show,
)


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
