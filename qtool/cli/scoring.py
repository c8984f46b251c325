"""The commands that give a runtime's numbers by themselves: score, embed.

Rule: no work happens here, and heavy imports wait until a command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool import console
from qtool.cli.options import (
    Columns,
    Concurrency,
    Dataset,
    Engine,
    Json,
    Limit,
    Mmproj,
    Revision,
    ServedModel,
    ShardOption,
    TaskOption,
    Token,
    parse_panels,
    parse_task,
    show,
)
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.scoring.score import PanelChoice

Target = Annotated[
    str,
    typer.Argument(metavar="TARGET", help="A folder, a GGUF file, org/name, a built-in demo model, or a server's URL."),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; of checkpoints.")]
Instruction = Annotated[str | None, typer.Option(help="Replaces the instruction of every query.", show_default=False)]
Anew = Annotated[bool, typer.Option("--force", help="Replace an existing output, and begin anew.")]
Family = Annotated[
    str | None, typer.Option(help="qwen3 or qwen3_vl, which no server tells; embedders need it.", show_default=False)
]


def score(
    target: Target,
    *,
    panel: Annotated[str | None, typer.Option(help="A JSONL file or a built-in panel.", show_default=False)] = None,
    dataset: Dataset = None,
    columns: Columns = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSONL file to write; an interrupted run goes on.", show_default="stdout"),
    ] = None,
    dtype: Dtype = "float32",
    instruction: Instruction = None,
    mmproj: Mmproj = None,
    limit: Limit = None,
    shard: ShardOption = None,
    force: Anew = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    family: Family = None,
    engine: Engine = None,
    served_model: ServedModel = None,
    concurrency: Concurrency = 8,
    json: Json = False,
) -> None:
    """Score the pairs of a panel: log-odds and probability of each, as JSON lines."""
    from qtool.scoring.runtime import RuntimeOptions
    from qtool.scoring.score import ScoreOptions
    from qtool.scoring.score import score as run

    runtime = RuntimeOptions(
        parse_task(task), dtype, revision=revision, token=token, mmproj=mmproj, family=family, engine=engine,
        served_model=served_model, concurrency=concurrency,
    )  # fmt: skip
    chosen = _panel(parse_panels([panel] if panel else [], dataset, columns), limit, shard, instruction)
    options = ScoreOptions(target=target, panel=chosen, runtime=runtime, output=output, force=force)
    with console.stage_bar("pairs") as progress:
        scores = run(options, progress)
    if output is None and not json:
        console.show_lines(pair.line for pair in scores.pairs)
    else:
        show(scores.to_json(), console.unwrapped(f"{len(scores.pairs):,} pairs in {output}"), as_json=json)


def embed(
    target: Target,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npy file to write; an interrupted run goes on.")],
    panel: Annotated[str | None, typer.Option(help="A JSONL file or a built-in panel.", show_default=False)] = None,
    dataset: Dataset = None,
    columns: Columns = None,
    texts: Annotated[Path | None, typer.Option(help="A file of texts, one a line.", show_default=False)] = None,
    dim: Annotated[
        int | None, typer.Option(min=1, help="Cut to N dimensions and normalise again (MRL).", show_default=False)
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Where to write which row is what.", show_default="beside OUTPUT")
    ] = None,
    dtype: Dtype = "float32",
    instruction: Instruction = None,
    mmproj: Mmproj = None,
    limit: Limit = None,
    shard: ShardOption = None,
    force: Anew = False,
    task: TaskOption = None,
    revision: Revision = None,
    token: Token = None,
    family: Family = None,
    engine: Engine = None,
    served_model: ServedModel = None,
    concurrency: Concurrency = 8,
    json: Json = False,
) -> None:
    """Embed a panel's queries and documents, or lines of text: vectors as .npy."""
    from qtool.scoring.embed import EmbedOptions, Texts
    from qtool.scoring.embed import embed as run
    from qtool.scoring.runtime import RuntimeOptions

    panels = parse_panels([panel] if panel else [], dataset, columns)
    if texts is not None and (panels or limit or shard):
        raise UsageError("--texts stands alone.", "Pass --panel or --dataset (with --limit and --shard), or --texts.")
    source = Texts(texts, instruction=instruction) if texts else _panel(panels, limit, shard, instruction)
    runtime = RuntimeOptions(
        parse_task(task), dtype, revision=revision, token=token, mmproj=mmproj, family=family, engine=engine,
        served_model=served_model, concurrency=concurrency,
    )  # fmt: skip
    options = EmbedOptions(target=target, source=source, output=output, dim=dim, ids=ids, runtime=runtime, force=force)
    with console.stage_bar("items") as progress:
        done = run(options, progress)
    count, width = done.vectors.shape
    where = f"{count:,} vectors of {width} in {output}, what they are of in {done.ids}"
    show(done.to_json(), console.unwrapped(where), as_json=json)


def _panel(panels: Sequence[str], limit: int | None, shard: str | None, instruction: str | None) -> PanelChoice:
    from qtool.inputs.panels import PanelShard
    from qtool.scoring.score import PanelChoice

    if len(panels) != 1:
        raise UsageError(
            "What is to be asked?", "Pass one panel: --panel FILE, or --dataset ID --columns ROLE=COLUMN,…."
        )
    share = PanelShard.parse(shard) if shard else None
    return PanelChoice(panels[0], limit=limit, shard=share, instruction=instruction)
