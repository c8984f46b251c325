"""Options that several commands share, what their words mean, and how a result is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from qtool import console
from qtool.arch.spec import Task
from qtool.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qtool.export.quantize import Backend

# Turns the words of a command line into the values that `run` functions take. A word that means nothing is a
# UsageError that lists what would.


_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes in a size such as 500MB, 5GB or 1GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise UsageError(f"{text!r} is no size.", "Write it as 500MB, 5GB or 1GiB.")
    return size


def parse_task(text: str | None) -> Task | None:
    """The task that --task names."""
    if text is None:
        return None
    if text not in {task.value for task in Task}:
        raise UsageError(f"--task is rerank or embed, not {text!r}.")
    return Task(text)


def parse_panels(panels: Sequence[str], dataset: str | None, columns: str | None) -> tuple[str, ...]:
    """The panels that --panel names, and the one that --dataset and --columns describe."""
    if (dataset is None) != (columns is None):
        raise UsageError(
            "--dataset and --columns go together.", "Write --dataset ID --columns query=COLUMN,positive=COLUMN."
        )
    from qtool.inputs.builtin import dataset_panel

    return (*panels, *([dataset_panel(dataset, columns)] if dataset and columns else []))


def parse_backend(text: str) -> Backend:
    """The backend that --backend names."""
    from qtool.export.quantize import BACKENDS

    for backend in BACKENDS:
        if backend == text:
            return backend
    raise UsageError(f"--backend is one of {', '.join(BACKENDS)}, not {text!r}.")


# Options that several commands share, and how a result is shown. An option is spelt and explained once.


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
