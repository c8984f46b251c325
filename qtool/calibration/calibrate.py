"""`qtool calibrate`: what data says about the inputs of a model's linears, for quantizing with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.calibration.collect import Collector, InputGroup, collect, input_groups, passes
from qtool.calibration.data import default_sets, load_calibration, questions
from qtool.calibration.facts import CalibrationFacts, calibration_facts
from qtool.calibration.hessian import Prediction, predict
from qtool.calibration.hessian_file import HessianFile, check_hessian_file
from qtool.calibration.imatrix import check_imatrix_file, write_imatrix
from qtool.console import written
from qtool.errors import SetupError, UsageError
from qtool.extras import require_extra
from qtool.options import Options
from qtool.progress import StageProgress, ignore
from qtool.results import Result, counted
from qtool.storage.hub import resolve
from qtool.storage.packed import is_quantized

if TYPE_CHECKING:
    import torch

    from qtool.formats.floats import Float32
    from qtool.scoring.transformers.observed import TokenCounts
    from qtool.scoring.transformers.prefix import Forward
    from qtool.scoring.transformers.runtime import TransformersScorer

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """The options of `qtool calibrate`.

    `data` are built-in sets, panels by name or path, or data sets; by default the sets that fit the model. `limit` takes
    the first queries of each. `output` is the importance matrix and `hessians` a safetensors file, for which at most
    `hessian_bytes` of sums are in memory; `predict` needs neither. `dtype` and `device` are those of `score`.
    """

    model: str
    data: tuple[str, ...] = ()
    output: Path | None = None
    hessians: Path | None = None
    predict: bool = False
    limit: int | None = None
    hessian_bytes: int = 2 << 30
    task: Task | None = None
    dtype: str = "float32"
    device: str = "auto"
    revision: str | None = None
    token: str | None = None
    force: bool = False

    def check(self) -> None:
        """Raise UsageError where nothing would come of it, or where an output exists."""
        if self.output is None and self.hessians is None and not self.predict:
            raise UsageError("Missing --output.", "Pass --output STATS.gguf, --hessians FILE or --predict.")
        if self.output is not None:
            check_imatrix_file(self.output, force=self.force)
        if self.hessians is not None:
            check_hessian_file(self.hessians, force=self.force)


@dataclass(frozen=True)
class GroupSummary:
    """One fused group: its input's columns, tokens and mean square, and what calibration is predicted to gain.

    `gain` is the predicted ratio of the output's error with error feedback to that of plain rounding, `gain_centred`
    that without the mean error, and no feedback can do better than `bound`; None without Hessians.
    """

    module: str
    columns: int
    tokens: int
    mean_square: float
    gain: float | None = None
    gain_centred: float | None = None
    bound: float | None = None


@dataclass(frozen=True, repr=False)
class Calibration(Result):
    """What was calibrated on, the groups in the order of the layers, and warnings that an artefact remembers."""

    architecture: str
    task: str
    data: CalibrationFacts
    groups: tuple[GroupSummary, ...]
    output: Path | None
    hessians: Path | None
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is to be said against the data."""
        return self.data.warnings

    @property
    @override
    def headline(self) -> str:
        facts = self.data
        pictures = f", {counted(facts.picture_tokens, 'token')} of them pictures" if facts.picture_tokens else ""
        return f"{self.architecture}: {counted(facts.tokens, 'token')} of {facts.name}{pictures}."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [asdict(group) for group in self.groups]

    @override
    def to_dict(self) -> dict[str, Any]:
        files = {
            name: str(path) if path else None for name, path in (("output", self.output), ("hessians", self.hessians))
        }
        return {"schema_version": SCHEMA_VERSION, **asdict(self), **files}


def calibrate(options: CalibrateOptions, progress: StageProgress | None = None) -> Calibration:
    """Run the model over the data and write the statistics. Raises UsageError, ModelError or SetupError."""
    started = time.monotonic()
    require_extra("score", "Calibrating")
    options.check()
    opened = CheckpointArtefact(resolve(options.model, options.revision, options.token), options.task)
    if is_quantized(opened.checkpoint.config):
        raise UsageError(f"{options.model} is quantized already.", "Calibrate the checkpoint that it was made from.")
    data = load_calibration(options.data or default_sets(opened), options.limit)
    reader = _Reader(opened, options)
    asked = questions(data, reader.scorer.task, reader.scorer.query_instruction)
    groups = input_groups(opened.detection)
    collector = Collector(groups)
    wants_hessians = options.predict or options.hessians is not None
    parts = passes(groups, options.hessian_bytes) if wants_hessians else []
    predictions: dict[str, Prediction] = {}
    with HessianFile(options.hessians, groups) if options.hessians else nullcontext() as file:
        for module, moments in collect(collector, reader.runner(asked, len(parts) or 1, progress or ignore), parts):
            predictions[module] = predict(moments)
            if file is not None:
                file.write(module, moments)
    facts = calibration_facts(
        data,
        text_tokens=reader.counts.text,
        picture_tokens=reader.counts.pictures,
        widest=max(group.columns for group in groups),
        is_vision=opened.family.is_vision,
    )
    if options.output is not None:
        write_imatrix(options.output, opened.family, groups, collector.squares, facts)
    return Calibration(
        opened.detection.architecture.name,
        reader.scorer.task.value,
        facts,
        tuple(_summary(group, collector, predictions) for group in groups),
        options.output,
        options.hessians,
        round(time.monotonic() - started, 1),
    )


class _Reader:
    """The model in transformers, whose passes show the inputs of linears."""

    def __init__(self, opened: CheckpointArtefact, options: CalibrateOptions) -> None:
        from qtool.scoring.transformers.observed import TokenCounts
        from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer

        self._prefix = opened.detection.architecture.prefix
        self.scorer: TransformersScorer = open_scorer(
            opened, ScorerOptions(options.task, options.dtype, options.device)
        )
        self.counts: TokenCounts = TokenCounts()

    def runner(
        self, asked: Sequence[Any], passes_in_all: int, progress: StageProgress
    ) -> Callable[[Sequence[InputGroup], Callable[[str, Float32], None]], None]:
        """What `collect` calls for each pass over the questions."""
        from qtool.scoring.transformers.observed import ObservedForward

        done = 0

        def advance(number: int) -> None:
            nonlocal done
            done += number
            progress("calibrating", done, len(asked) * passes_in_all)

        def run(groups: Sequence[InputGroup], take: Callable[[str, Float32], None]) -> None:
            forward = _forward(self.scorer)
            modules = {self._path(group): group.module for group in groups}
            observed = ObservedForward(
                forward.base, forward.device, forward.picture_tokens, modules, lambda name, x: take(name, _numbers(x))
            )
            observed.read(map(self.scorer.prompt, asked), advance)
            self.counts = observed.counts

        return run

    def _path(self, group: InputGroup) -> str:
        """The first member in the model that transformers builds: all members read the same."""
        return group.hf_names[0].removeprefix(self._prefix).removesuffix(".weight")


def _forward(scorer: TransformersScorer) -> Forward:
    from qtool.scoring.transformers.prefix import SharedReader

    reader = scorer.loaded.reader
    if not isinstance(reader, SharedReader):
        raise SetupError(
            "The model does not fit into the free memory whole, as qtool calibrate needs it.",
            "Close other programs, or pass --dtype bfloat16.",
        )
    return reader.forward


def _numbers(inputs: torch.Tensor) -> Float32:
    numbers: Float32 = inputs.float().cpu().numpy()
    return numbers


def _summary(group: InputGroup, collector: Collector, predictions: dict[str, Prediction]) -> GroupSummary:
    sums, found = collector.squares[group.module], predictions.get(group.module)
    facts = (found.gain, found.gain_centred, found.bound) if found else ()
    return GroupSummary(group.module, group.columns, sums.tokens, sums.mean_square, *facts)


def calibration_table(result: Calibration) -> RenderableType:
    """What was read, the predicted gain of each group where Hessians were summed, warnings, and what to do next."""
    lines = [Text(result.headline)]
    lines += [Text(f"WARNING: {warning}") for warning in result.warnings]
    if any(group.gain is not None for group in result.groups):
        lines[:0] = [Text(_PREDICTED), Text("")]
    return Group(*_tables(result), *lines, *_next(result))


_PREDICTED: Final = (
    "Predicted error of the output relative to plain rounding, from the inputs alone. Centred, without the mean error, is "
    "the more careful number; no rounding with feedback gets below the bound."
)


_LAYERS: Final = "layers."


def _tables(result: Calibration) -> Iterator[RenderableType]:
    if all(group.gain is None for group in result.groups):
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("group", overflow="fold")
    for heading in ("columns", "predicted", "centred", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in result.groups:
        ratios = (f"{ratio:.3f}" for ratio in (group.gain, group.gain_centred, group.bound) if ratio is not None)
        table.add_row(group.module[max(group.module.find(_LAYERS), 0) :], f"{group.columns:,}", *ratios)
    yield table
    yield Text("")


def _next(result: Calibration) -> Iterator[RenderableType]:
    if result.hessians is not None:
        yield Text(f"Wrote the Hessians to {result.hessians}.")
    if result.output is not None:
        yield written(result.output, "convert-gguf MODEL -o OUT --outtype q4_k_m --imatrix")
