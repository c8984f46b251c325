"""`qtool quantize` by a recipe that fits weights to data: read the data, round layer after layer, export."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from typing_extensions import override

from qtool.artefact import CheckpointArtefact
from qtool.calibration.data import default_sets, joined, load_each, questions
from qtool.calibration.facts import CalibrationFacts, calibration_facts, shortcomings
from qtool.calibration.group import BEST, FAST, STANDARD, Effort, calibrate_group
from qtool.calibration.loops import loops_on
from qtool.calibration.moments import Moments, single_threaded_blas
from qtool.calibration.processor import processor
from qtool.calibration.workfolder import RoundedLinear, WorkFolder, work_folder
from qtool.console import human_size
from qtool.errors import SetupError, UsageError
from qtool.export.nvfp4 import Rounding
from qtool.export.quantize import (
    CalibrationSummary,
    QuantizationSummary,
    QuantizeJob,
    QuantizeOptions,
    prepare_quantization,
    quantize,
    summarize_quantization,
    write_artefact,
)
from qtool.extras import require_extra
from qtool.formats.nvfp4_checksums import checksums, float_checksum
from qtool.formats.nvfp4_kernels import dequantize
from qtool.inputs.builtin import source_name
from qtool.memory import free_memory, resident_memory
from qtool.options import parse_size
from qtool.progress import Progress, StageProgress, ignore
from qtool.recipe import CalibrationSpec, load_recipe
from qtool.workers import WORKERS, worker_pool

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import torch

    from qtool.calibration.gradients import Answer, GradientPass, LayerGradients
    from qtool.calibration.streams import Streams
    from qtool.formats.floats import U8, Float32
    from qtool.inputs.panels import Panel
    from qtool.scoring.prompt import Prompt
    from qtool.scoring.transformers.layerwise import LayerwiseModel, Pictures
    from qtool.scoring.transformers.observed import TokenCounts
    from qtool.scoring.transformers.prefix import Pass

VERSION: Final = 1
"""Of the algorithm and its fixed numbers: interrupted runs of another version are not taken over."""

EFFORTS: Final[Mapping[str, Effort]] = {"fast": FAST, "standard": STANDARD, "best": BEST}
NOT_BEST: Final = (
    "The effort best follows the gradients of the answers to the data, which has too few tokens for that or lacks a "
    "modality: standard was done instead."
)

_PROBE_TOKENS: Final = 4096
_SHARE: Final = 0.8


def quantize_by_recipe(options: QuantizeOptions, progress: Progress = ignore) -> QuantizationSummary:
    """Quantize by any recipe."""
    if load_recipe(options.recipe).recipe.calibration is None:
        return quantize(options, progress)
    return quantize_calibrated(options, lambda _, done, total: progress(done, total))


def quantize_calibrated(
    options: QuantizeOptions, progress: StageProgress = ignore, data: Panel | None = None
) -> QuantizationSummary:
    """Quantize `options.model` into the folder `options.output`; with `dry_run`, plan it and measure a part of a layer.

    `data` is read instead of what `options.data` names. A killed run goes on at the layer that it was in, from the folder
    `OUTPUT.calibration`.
    """
    require_extra("score", "Quantizing with calibration data")
    started = time.monotonic()
    job = prepare_quantization(options)
    spec = _spec(job, options)
    with opened_run(job, options, spec, data) as run:
        if options.dry_run or options.output is None:
            return replace(summarize_quantization(job), calibration=run.estimate())
        with work_folder(options.output, run.key(), force=options.force) as folder:
            run.round_layers(folder, progress)
            rounding = StoredRounding(folder, run, round(time.monotonic() - started, 1))
            summary = write_artefact(job, options, options.output, partial(progress, "writing"), rounding)
            folder.remove()
    return replace(summary, calibration=rounding.summary)


def _spec(job: QuantizeJob, options: QuantizeOptions) -> CalibrationSpec:
    """The recipe's specification under --effort; "fast" reads half the tokens."""
    given = job.recipe.recipe.calibration or CalibrationSpec()
    effort = options.effort or given.effort
    tokens = max(given.tokens // 2, 1) if effort == "fast" else given.tokens
    return CalibrationSpec(effort=effort, tokens=tokens)


# The run: the streams of the data through the layers.


@contextmanager
def opened_run(
    job: QuantizeJob, options: QuantizeOptions, spec: CalibrationSpec, given: Panel | None = None
) -> Iterator[CalibrationRun]:
    """The data as passes over the model, whose weights are read layer by layer; `given` stands for what is named."""
    from qtool.calibration.streams import PASSES, Streams, one_thread_each
    from qtool.scoring.scorer import checkpoint_sha256
    from qtool.scoring.transformers.activations import ActivationStore
    from qtool.scoring.transformers.layerwise import Pictures
    from qtool.scoring.transformers.observed import TokenCounts
    from qtool.scoring.transformers.prefix import plan_passes
    from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer

    opened = CheckpointArtefact(job.source, options.task)
    named = options.data or default_sets(opened)
    panels = [given] if given else load_each(named, options.limit)
    names = [given.name] if given else map(source_name, named)
    data = joined(panels)
    sources = [{"name": name, "sha256": each.sha256} for name, each in zip(names, panels, strict=True)]
    scorer = open_scorer(opened, ScorerOptions(options.task, device=_device(options.device)))
    model = scorer.layers()
    effort = EFFORTS[spec.effort]
    columns = [(tensor.source.shape[1], tensor.source.shape[0]) for tensor in sum(job.plan.groups.values(), ())]
    fixed = _fixed_memory(model, columns, effort)
    budget = _budget(options, fixed)
    scratch = options.output.absolute().parent if options.output else None
    with ExitStack() as stack:
        store = stack.enter_context(ActivationStore(budget - fixed, model.device, scratch))
        pictures = Pictures(model, store, budget, encodes=options.output is not None and not options.dry_run)
        counts = TokenCounts()
        prompts = list(_prompts(map(scorer.prompt, questions(data, scorer.task, scorer.query_instruction)),
                                pictures, model, spec.tokens, counts))  # fmt: skip
        pictures.finish()
        spans = [model.span(prompt) for prompt in prompts]
        facts = calibration_facts(
            data,
            text_tokens=counts.text,
            picture_tokens=counts.pictures,
            widest=max(width for width, _ in columns),
            is_vision=opened.family.is_vision,
        )
        widest = max(width for width, _ in columns)
        if effort.gradients and shortcomings(data, counts.total, widest, is_vision=opened.family.is_vision):
            effort = STANDARD
            facts = replace(facts, warnings=(*facts.warnings, NOT_BEST))
        pool = stack.enter_context(worker_pool())
        stack.enter_context(single_threaded_blas())
        stack.enter_context(one_thread_each())
        streams = Streams(model, list(plan_passes(prompts, spans, PASSES)), pictures, store, pool)
        yield CalibrationRun(
            job=job,
            spec=spec,
            effort=effort,
            model=model,
            streams=streams,
            answer=scorer.answer(),
            facts=facts,
            model_sha256=partial(checkpoint_sha256, opened.path),
            pool=pool,
            fixed_memory=fixed,
            budget=budget,
            sources=sources,
            limit=options.limit,
        )


def _prompts(
    prompts: Iterable[Prompt], pictures: Pictures, model: LayerwiseModel, tokens: int, counts: TokenCounts
) -> Iterator[Prompt]:
    """The first prompts that have so many distinct tokens, without pixels; `counts` says how many there were."""
    from qtool.scoring.transformers.observed import SeenPrefixes

    seen = SeenPrefixes()
    for prompt in prompts:
        registered = pictures.registered(prompt)
        span = model.span(registered)
        is_new = seen.new(span)
        counts.pictures += int((is_new & span.is_picture).sum())
        counts.text += int((is_new & ~span.is_picture).sum())
        yield registered
        if counts.total >= tokens:
            return


def _device(name: str) -> str:
    """The device that `name` comes to; ModelError and other errors of torch aside, UsageError for one without float64."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(name).type not in ("cpu", "cuda"):
        raise UsageError(f"Weights cannot be fitted to data on {name}.", "Pass --device cpu, or a CUDA device.")
    return name


def _fixed_memory(model: LayerwiseModel, shapes: Sequence[tuple[int, int]], effort: Effort) -> int:
    """Bytes that are held whatever the data: two layers, the sums of the widest group, and what its rounding needs.

    Gradients need the sums of all outputs of a layer at once, and the graphs of some passes.
    """
    from qtool.calibration.streams import PASSES

    work = max(8 * (6 * columns * columns + 2 * rows * columns) for columns, rows in shapes)
    if effort.gradients:
        layer = len(shapes) // max(model.layers, 1)
        sums = sum(12 * rows * rows for _, rows in shapes[:layer])
        work = max(work, sums + 2 * (WORKERS + 2) * PASSES.padded_tokens * model.footprint.token)
    return model.footprint.fixed + work


def _budget(options: QuantizeOptions, fixed: int) -> int:
    free = free_memory()
    if options.memory != "auto":
        budget = parse_size(options.memory)
    elif free is not None:
        budget = resident_memory() + int(_SHARE * free)
    else:
        budget = 2 * fixed
    if budget < fixed:
        raise SetupError(
            f"Calibrating the model needs {human_size(fixed)} of memory; {human_size(budget)} may be used.",
            "Pass a larger --memory, or close other programs.",
        )
    return budget


@dataclass
class CalibrationRun:
    """Everything known before the first layer; `rounding_seconds` counts up as groups are rounded."""

    job: QuantizeJob
    spec: CalibrationSpec
    effort: Effort
    model: LayerwiseModel
    streams: Streams
    answer: Answer
    facts: CalibrationFacts
    model_sha256: Callable[[], str]
    pool: Executor
    fixed_memory: int
    budget: int
    sources: Sequence[Mapping[str, str]]
    limit: int | None = None
    rounding_seconds: float = 0.0

    def key(self) -> Mapping[str, Any]:
        """What must be equal for an interrupted run to be taken over."""
        return {
            "version": VERSION,
            "model": self.model_sha256(),
            "recipe": self.job.recipe.sha256,
            "effort": self.spec.effort,
            "parameters": self.parameters,
            "data": self.facts.sha256,
            "limit": self.limit,
            "device": self.model.device.type,
            "tokens": self.streams.tokens,
        }

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The numbers of the algorithm."""
        return asdict(self.effort)

    def round_layers(self, folder: WorkFolder, progress: StageProgress) -> None:
        """Round every layer that is not finished, each on top of those before."""
        first, layers = folder.finished, self.model.layers
        if first == layers:
            return
        if self.effort.gradients:
            self._find_gradients(folder, progress)
        if first:
            folder.load_streams(first, self.streams)
        else:
            self.streams.begin()
        weights = self.model.layer_weights(range(first, layers))
        for layer in range(first, layers):
            advance = partial(self._advance, progress, layer)
            advance(0.0)
            gradients = folder.gradients(layer, self._pass_tokens) if self.effort.gradients else None
            linears = self.round_layer(layer, next(weights), gradients, advance)
            folder.save_layer(layer, linears)
            folder.save_streams(layer + 1, self.streams)
        progress("calibrating", layers * self.streams.tokens, layers * self.streams.tokens)

    def _advance(self, progress: StageProgress, layer: int, part: float) -> None:
        tokens, layers = self.streams.tokens, self.model.layers
        done = min(int((layer + part) * tokens), (layer + 1) * tokens - 1)
        progress(f"calibrating, layer {layer + 1} of {layers}", done, layers * tokens)

    def _find_gradients(self, folder: WorkFolder, progress: StageProgress) -> None:
        """How much tokens and outputs matter, by two passes over all layers: forward and backward."""
        tokens, layers = self.streams.tokens, self.model.layers

        def advance(layer: int, is_forward: bool) -> None:  # noqa: FBT001 - a callback
            done, where = (layer, "forward") if is_forward else (2 * layers - layer - 1, "backward")
            progress(f"gradients, layer {layer + 1} of {layers} {where}", done * tokens, 2 * layers * tokens)

        with self.gradient_pass() as gradients:
            gradients.run(folder, advance)
        progress("gradients", 2 * layers * tokens, 2 * layers * tokens)

    @contextmanager
    def gradient_pass(self) -> Iterator[GradientPass]:
        """The pass that finds gradients, with a store of its own: the states before all layers are needed until the gradients are known."""
        from qtool.calibration.gradients import GradientPass

        with self.streams.store.beside() as store:
            yield GradientPass(self.streams, store, self.answer)

    @property
    def _pass_tokens(self) -> list[int]:
        return [sum(map(len, each.spans)) for each in self.streams.passes]

    def round_layer(
        self,
        layer: int,
        weights: Mapping[str, torch.Tensor],
        gradients: LayerGradients | None = None,
        advance: Callable[[float], None] = ignore,
    ) -> dict[RoundedLinear, tuple[U8, U8]]:
        """Take both streams through a layer; its linears, rounded."""
        import torch

        from qtool.calibration.gradients import token_weights

        members = self._members(layer)
        stages = self._stages(members)
        found: dict[RoundedLinear, tuple[U8, U8]] = {}

        def round_group(linears: Sequence[str], moments: Moments) -> Mapping[str, torch.Tensor]:
            started = time.monotonic()
            given = [weights[f"{linear}.weight"].cpu().numpy() for linear in linears]
            result = calibrate_group(
                given,
                moments,
                self.effort,
                pool=self.pool,
                output_covariance=(lambda index: gradients.covariances[linears[index]]) if gradients else None,
                loops=loops_on(self.model.device, self.pool),
            )
            self.rounding_seconds += time.monotonic() - started
            restored = {}
            for linear, original, rounded in zip(linears, given, result.weights, strict=True):
                weight = dequantize(rounded.packed, rounded.block_scales, result.global_scale)
                restored[linear] = torch.from_numpy(weight)
                hf_name, group = members[f"{linear}.weight"]
                facts = RoundedLinear(
                    hf_name=hf_name,
                    group=group,
                    global_scale=float(result.global_scale),
                    relative_error=_relative_error(original, weight),
                    output_error=rounded.error,
                    max_output_error=rounded.max_error,
                    predicted_gain=result.predicted_gain,
                    warnings=result.warnings,
                    source_crc32=float_checksum(original),
                    checksums=checksums(rounded.packed, rounded.block_scales).encoded(),
                )
                found[facts] = rounded.packed, rounded.block_scales
            advance(len(found) / len(members))
            return restored

        counted = {stage: token_weights(each) for stage, each in gradients.squares.items()} if gradients else None
        self.streams.through(layer, dict(weights), stages, round_group, counted)
        return found

    def _members(self, layer: int) -> Mapping[str, tuple[str, str]]:
        """Canonical hf_name and fused group of the layer's quantized weights, by name within the layer."""
        planned = {
            tensor.source.hf_name: (tensor.spec.hf_name, group)
            for group, tensors in self.job.plan.groups.items()
            for tensor in tensors
        }
        return {name: planned[hf_name] for name, hf_name in self.model.layer_names(layer).items() if hf_name in planned}

    def _stages(self, members: Mapping[str, object]) -> list[tuple[str, ...]]:
        from qtool.calibration.streams import STAGES

        return [stage for stage in STAGES if f"{stage[0]}.weight" in members]

    # What it will take: a layer with some of the tokens is measured.

    def estimate(self) -> CalibrationSummary:
        """Time, memory and disk of the whole run, from one layer on a part of the data: rounding does not grow with the data."""
        part = _first_passes(self.streams.passes, _PROBE_TOKENS)
        probe = replace(self, streams=replace(self.streams, passes=part), rounding_seconds=0.0)
        probe.streams.begin()
        weights = next(self.model.layer_weights(range(1)))
        started = time.monotonic()
        gradients = None
        if self.effort.gradients:
            with probe.gradient_pass() as first:
                gradients = first.first_layer(weights)
        probe.round_layer(0, weights, gradients)
        reading = time.monotonic() - started - probe.rounding_seconds
        seconds = probe.rounding_seconds + reading * self.streams.tokens / probe.streams.tokens
        memory, disk = self._space()
        return self.summary(seconds=round(self.model.layers * seconds, 1), memory=memory, disk=disk)

    def _space(self) -> tuple[int, int]:
        """Bytes of memory and of disk beside the artefact: hidden states beyond the memory go to the scratch file."""
        layers, shapes = self.model.layers, [each.source.shape for each in sum(self.job.plan.groups.values(), ())]
        positions = sum(each.padded_tokens for each in self.streams.passes)
        stream = 4 * positions * self.model.hidden_size
        widest = max(columns for _, columns in shapes)
        held = 2 * stream + 4 * positions * (self.model.hidden_size + widest)
        disk = sum(rows * columns * 9 // 16 for rows, columns in shapes) + 4 * stream
        if self.effort.gradients:
            held = max(held, (layers + 2) * stream)
            disk += sum(4 * rows * rows for rows, _ in shapes)
        return min(self.budget, self.fixed_memory + held), disk + max(self.fixed_memory + held - self.budget, 0)

    def summary(self, **more: Any) -> CalibrationSummary:
        """What is known of the data and the algorithm, and `more`."""
        facts = self.facts
        return CalibrationSummary(
            effort=self.spec.effort, data=facts.name, tokens=self.streams.tokens, warnings=facts.warnings, **more
        )


def _first_passes(passes: Sequence[Pass], tokens: int) -> list[Pass]:
    """The trunk and the first branches, with at least so many tokens if there are."""
    chosen: list[Pass] = []
    for each in passes:
        if each.depth == 1 and sum(len(span) for known in chosen for span in known.spans) >= tokens:
            break
        chosen.append(each)
    return chosen


@dataclass(frozen=True)
class StoredRounding(Rounding):
    """The finished layers of a working folder, as the export engine reads them."""

    folder: WorkFolder
    run: CalibrationRun
    seconds: float

    @cached_property
    def _linears(self) -> Mapping[str, tuple[int, RoundedLinear]]:
        layers = range(self.run.model.layers)
        return {linear.hf_name: (layer, linear) for layer in layers for linear in self.folder.linears(layer)}

    @property
    @override
    def relative_errors(self) -> Mapping[str, float]:
        return {hf_name: linear.relative_error for hf_name, (_, linear) in self._linears.items()}

    @property
    def summary(self) -> CalibrationSummary:
        """What came of it: the mean squares of the linears' output errors, as roots."""
        linears = [linear for _, linear in self._linears.values()]
        return self.run.summary(
            seconds=self.seconds,
            output_error=_root_mean_square([linear.output_error for linear in linears]),
            max_output_error=_root_mean_square([linear.max_output_error for linear in linears]),
        )

    @property
    @override
    def manifest(self) -> Mapping[str, Any]:
        run = self.run
        facts = {
            "algorithm": run.job.recipe.recipe.algorithm,
            "version": VERSION,
            "effort": run.spec.effort,
            "parameters": run.parameters,
            "sources": list(run.sources),
            "limit": run.limit,
            "passes_tokens": run.streams.tokens,
            **run.facts.to_dict(),
        }
        return {"calibration": facts, "run": {"seconds": self.seconds, "processor": processor()}}

    @override
    def tensor_facts(self, hf_name: str) -> Mapping[str, Any]:
        linear = self._linears[hf_name][1]
        names = ("output_error", "max_output_error", "predicted_gain")
        rounded = {name: float(f"{getattr(linear, name):.4g}") for name in names}
        exact = ("relative_error", "global_scale", "source_crc32", "checksums")
        return rounded | {name: getattr(linear, name) for name in exact}

    @override
    def global_scale(self, hf_name: str) -> np.float32:
        return np.float32(self._linears[hf_name][1].global_scale)

    @override
    def arrays(self, hf_name: str) -> tuple[U8, U8]:
        return self.folder.arrays(self._linears[hf_name][0], hf_name)


def _root_mean_square(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values else 0.0


def _relative_error(original: Float32, restored: Float32) -> float:
    power = float(np.einsum("ij,ij->", original, original, dtype=np.float64))
    difference = original - restored
    return (
        float(np.sqrt(float(np.einsum("ij,ij->", difference, difference, dtype=np.float64)) / power)) if power else 0.0
    )
