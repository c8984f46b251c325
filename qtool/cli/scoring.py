"""The commands that give a model's own numbers: score, embed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qtool import console
from qtool.cli.options import (
    AllowLocalAddresses,
    AllowOutsideFiles,
    Columns,
    Concurrency,
    Dataset,
    Device,
    Dtype,
    Engine,
    Family,
    ForceAnew,
    Instruction,
    Json,
    Limit,
    MemoryOption,
    Mmproj,
    Panel,
    Revision,
    ServedModel,
    ShardOption,
    Target,
    TaskOption,
    Timeout,
    Token,
    check_panel,
    show,
)
from qtool.errors import UsageError


def score(
    target: Target,
    *,
    panel: Panel = None,
    dataset: Dataset = None,
    columns: Columns = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSONL file to write; an interrupted run continues.", show_default="stdout"
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    memory: MemoryOption = "auto",
    instruction: Instruction = None,
    mmproj: Mmproj = None,
    limit: Limit = None,
    shard: ShardOption = None,
    allow_outside_files: AllowOutsideFiles = False,
    allow_local_addresses: AllowLocalAddresses = False,
    force: ForceAnew = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    family: Family = None,
    engine: Engine = None,
    served_model: ServedModel = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    json: Json = False,
) -> None:
    """Score the pairs of a panel: log-odds and probability of each, as JSON lines."""
    from qtool import api
    from qtool.results import counted

    check_panel(panel, dataset, columns)
    scores = api.score(
        target,
        panel=panel,
        dataset=dataset,
        columns=columns,
        limit=limit,
        shard=shard,
        allow_outside_files=allow_outside_files,
        allow_local_addresses=allow_local_addresses,
        instruction=instruction,
        output=output,
        force=force,
        task=task,
        dtype=dtype,
        device=device,
        memory=memory,
        revision=revision,
        token=token,
        mmproj=mmproj,
        engine=engine,
        served_model=served_model,
        family=family,
        concurrency=concurrency,
        timeout=timeout,
    )
    if output is None and not json:
        console.show_lines(pair.line for pair in scores.pairs)
    else:
        show(scores, console.unwrapped(f"Wrote {counted(len(scores.pairs), 'score')} to {output}."), as_json=json)


def embed(
    target: Target,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .npy file to write; an interrupted run continues.")
    ],
    panel: Panel = None,
    dataset: Dataset = None,
    columns: Columns = None,
    texts: Annotated[Path | None, typer.Option(help="A file of texts, one a line.", show_default=False)] = None,
    dim: Annotated[
        int | None, typer.Option(min=1, help="Cut to N dimensions and normalise again (MRL).", show_default=False)
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="JSONL file to write that names each row.", show_default="OUTPUT.ids.jsonl")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    memory: MemoryOption = "auto",
    instruction: Instruction = None,
    mmproj: Mmproj = None,
    limit: Limit = None,
    shard: ShardOption = None,
    allow_outside_files: AllowOutsideFiles = False,
    allow_local_addresses: AllowLocalAddresses = False,
    force: ForceAnew = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    family: Family = None,
    engine: Engine = None,
    served_model: ServedModel = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    json: Json = False,
) -> None:
    """Embed a panel's queries and documents, or lines of text: vectors as .npy."""
    from qtool import api
    from qtool.results import counted

    if texts is None:
        check_panel(panel, dataset, columns)
    else:
        _check_texts_only({"panel": panel, "dataset": dataset, "columns": columns, "limit": limit, "shard": shard})
    made = api.embed(
        target,
        texts=texts,
        panel=panel,
        dataset=dataset,
        columns=columns,
        limit=limit,
        shard=shard,
        allow_outside_files=allow_outside_files,
        allow_local_addresses=allow_local_addresses,
        instruction=instruction,
        output=output,
        ids=ids,
        dim=dim,
        force=force,
        task=task,
        dtype=dtype,
        device=device,
        memory=memory,
        revision=revision,
        token=token,
        mmproj=mmproj,
        engine=engine,
        served_model=served_model,
        family=family,
        concurrency=concurrency,
        timeout=timeout,
    )
    count, width = made.vectors.shape
    vectors = f"{counted(count, 'vector')} of {counted(width, 'dimension')}"
    where = f"Wrote {vectors} to {output} and the names of the rows to {made.ids}."
    show(made, console.unwrapped(where), as_json=json)


def _check_texts_only(others: dict[str, object]) -> None:
    for name, value in others.items():
        if value is not None:
            raise UsageError(
                f"--texts cannot be combined with --{name}.",
                "Pass --texts, or --panel or --dataset with --limit and --shard.",
            )
