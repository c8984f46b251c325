"""Options that several commands share, and how a result is shown.

Rule: an option is spelt and explained once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtool import console

if TYPE_CHECKING:
    from rich.console import RenderableType

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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, to the byte, and stop.")]
Instruction = Annotated[
    str | None, typer.Option(help="Bake this instruction into a reranker's prompt.", show_default="the official one")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output that qtool made.")]

Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="ID[:CONFIG][#SPLIT]", help="Take a panel from this data set, of the hub or a file.", show_default=False
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="ROLE=COLUMN,...",
        help="Which column is query, positive, negative, documents, labels.",
        show_default=False,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N queries.", show_default=False)]
Mmproj = Annotated[
    Path | None, typer.Option(help="A GGUF file's projector; by default the one beside it.", show_default=False)
]
Engine = Annotated[
    str | None, typer.Option(help="vllm, llama-server, tei or jina.", show_default="what the server says")
]
ServedModel = Annotated[
    str | None, typer.Option(help="The model's name on the server.", show_default="what the server says")
]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests to a server at a time.")]
ShardOption = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Every N-th query, from the I-th on.", show_default=False)
]


def show(data: Mapping[str, Any], for_people: RenderableType, *, as_json: bool) -> None:
    """Print a result: for people, or as JSON."""
    if as_json:
        console.show_json(data)
    else:
        console.show_result(for_people)
