"""The options that several commands share, each declared once, and how a result is shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from qtool import console, resources
from qtool.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qtool.results import Result

# Choices: a test holds them to what the library knows, which is too slow to import for --help.


TaskChoice = Literal["rerank", "embed"]
BackendChoice = Literal["auto", "streaming", "modelopt"]
EffortChoice = Literal["fast", "standard", "best"]
DtypeChoice = Literal["float32", "bfloat16", "float16"]
EngineChoice = Literal["vllm", "llama-server", "tei", "jina"]
ServingChoice = Literal["vllm", "llama-server", "sglang"]
PromptChoice = Literal["official", "llamacpp"]
ProjectorChoice = Literal["f32", "f16", "bf16", "q8_0", "none"]
OUTTYPES: Final = ("auto", "f32", "f16", "bf16", "q8_0", "nvfp4", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs")
DEVICES: Final = ("auto", "cpu", "cuda", "cuda:1", "mps")


def _starting(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _families() -> list[str]:
    from qtool.arch.families import FAMILIES

    return sorted(FAMILIES)


def _metrics() -> list[str]:
    from qtool.verify.metrics import METRICS

    return sorted({name for names in METRICS.values() for name in names if "_mrl" not in name})


def complete_outtype(incomplete: str) -> list[str]:
    """The types that may follow; several are joined by commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in OUTTYPES if name.startswith(last.lower())]


_recipes: Final = resources.names("recipes", ".yaml")
_panels: Final = resources.names("calibration/panels", ".jsonl")
_sets: Final = resources.names("calibration", ".jsonl")
RECIPES: Final = ", ".join(_recipes)
PANELS: Final = ", ".join(_panels)
CALIBRATION_SETS: Final = ", ".join(_sets)

complete_recipe: Final = _starting(lambda: _recipes)
complete_panel: Final = _starting(lambda: _panels)
complete_calibration: Final = _starting(lambda: [*_sets, *_panels])
complete_metric: Final = _starting(_metrics)
complete_model: Final = _starting(resources.demo_models)


def parse_device(device: str) -> str:
    """A device that torch can name."""
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise UsageError(f"Invalid --device {device!r}: expected auto, cpu, cuda, cuda:N, xpu or mps.")
    return device


# The options.


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, org/name, hf://org/name@revision, or a built-in demo model.",
        autocompletion=complete_model,
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A folder, a GGUF file, org/name, a built-in demo model, or a server's URL.",
        autocompletion=complete_model,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)]
Token = Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Hub access token.", show_default=False)]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read a repository's weights by range, or store them in the cache.",
        show_default="stored, unless the disk is too short",
    ),
]
TaskOption = Annotated[
    TaskChoice | None,
    typer.Option("--task", help="Task of the model, instead of the one that it declares.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be written, to the byte, and stop.")]
DryRunTime = Annotated[bool, typer.Option("--dry-run", help="Say how long it would take, and stop.")]
BakedInstruction = Annotated[
    str | None, typer.Option(help="Bake this instruction into a reranker's prompt.", show_default="the official one")
]
Instruction = Annotated[str | None, typer.Option(help="Replace the instruction of every query.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output that qtool made.")]
ForceAnew = Annotated[bool, typer.Option("--force", help="Replace an existing output, and discard a partial one.")]
Recipe = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE", help=f"Built-in recipe ({RECIPES}) or a YAML file.", autocompletion=complete_recipe
    ),
]
Panel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help=f"Built-in panel ({PANELS}) or a JSONL file.",
        autocompletion=complete_panel,
        show_default=False,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="NAME|FILE",
        help=f"Calibration data: a built-in set ({CALIBRATION_SETS}), panel or JSONL file; may be repeated.",
        show_default="the sets that fit the model",
        autocompletion=complete_calibration,
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        metavar="ID[:CONFIG][#SPLIT]", help="Take a panel from a data set on the hub or in a file.", show_default=False
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="ROLE=COLUMN,...",
        help="The columns of the data set: query, positive, negative, documents, labels.",
        show_default=False,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use the first N queries only.", show_default=False)]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Use every N-th query only, from the I-th on.", show_default=False),
]
AllowOutsideFiles = Annotated[
    bool, typer.Option("--allow-outside-files", help="Let a panel name files outside of its folder.")
]
AllowLocalAddresses = Annotated[
    bool,
    typer.Option("--allow-local-addresses", help="Let a panel name addresses of this machine and its network."),
]
Dtype = Annotated[DtypeChoice, typer.Option(help="Precision in which a checkpoint is run.")]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda[:N]|mps",
        help="Device on which a checkpoint is run.",
        callback=parse_device,
        autocompletion=_starting(lambda: list(DEVICES)),
    ),
]
MemoryOption = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="auto|SIZE",
        help="Run a checkpoint layer by layer within this memory, such as 8GB; auto does so where it does not fit whole.",
    ),
]
Mmproj = Annotated[Path | None, typer.Option(help="Vision projector of a GGUF file.", show_default="the one beside it")]
Family = Annotated[
    str | None,
    typer.Option(
        metavar="FAMILY",
        help="Family of a server's model, such as qwen3_vl; needed for embedders.",
        autocompletion=_starting(_families),
        show_default=False,
    ),
]
Engine = Annotated[EngineChoice | None, typer.Option(help="What the server runs.", show_default="as it reports")]
ServedModel = Annotated[str | None, typer.Option(help="Name of the model on the server.", show_default="as it reports")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests to a server at a time.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds that a server has for each request.")]


def at_revision(model: str, revision: str | None) -> str:
    """A model of the hub with its revision, as one word."""
    return model if revision is None else f"hf://{model.removeprefix('hf://')}@{revision}"


def show(result: Result, for_people: RenderableType, *, as_json: bool) -> None:
    """Print a result, as JSON or for people."""
    if as_json:
        console.show_json(result.to_dict())
    else:
        console.show_result(for_people)


def require_output(output: Path | None, *, dry_run: bool) -> None:
    """Raise UsageError where there is nothing to write to."""
    if output is None and not dry_run:
        raise UsageError("Missing --output.", "Pass --output PATH, or --dry-run to see what would be written.")


def check_panel(panel: str | None, dataset: str | None, columns: str | None) -> None:
    """Raise UsageError unless the options name one panel."""
    check_dataset(dataset, columns)
    if (panel is None) == (dataset is None):
        found = "Missing --panel." if panel is None else "--panel cannot be combined with --dataset."
        raise UsageError(found, "Pass --panel NAME, --panel FILE, or --dataset ID --columns ROLE=COLUMN,...")


def check_dataset(dataset: str | None, columns: str | None) -> None:
    """Raise UsageError where a data set is described by half."""
    if (dataset is None) != (columns is None):
        raise UsageError(
            "--dataset and --columns must be given together.",
            "For example --dataset ID --columns query=COLUMN,positive=COLUMN.",
        )
