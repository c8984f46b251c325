"""`qtool tune`: which fused groups stay unquantized, for a budget of bits or of drift, found and then measured on data."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from qtool.arch.spec import Task
from qtool.artefact import CheckpointArtefact
from qtool.calibration.choice import (
    SUPER_BLOCK,
    Candidate,
    Level,
    bits_per_weight,
    candidates,
    levels_within,
    ranked,
    within,
)
from qtool.calibration.data import default_sets, load_calibration
from qtool.calibration.held_out import HeldOut, Measured, divided
from qtool.calibration.quantize import quantize_calibrated
from qtool.calibration.tuned_recipe import RECIPE, TENSOR_TYPES, plain_max, recipe_text, tensor_types
from qtool.errors import UsageError
from qtool.export.quantize import Effort, QuantizeJob, QuantizeOptions, prepare_quantization
from qtool.export.quantize_plan import plan_quantization
from qtool.extras import require_extra
from qtool.jsonfile import json_bytes
from qtool.manifest import FILE_NAME as MANIFEST
from qtool.manifest import manifest, versions
from qtool.options import Memory, Options
from qtool.progress import StageProgress, ignore
from qtool.recipe import load_recipe, parse_recipe
from qtool.results import Result, counted
from qtool.storage.atomic import check_target, require_space, staged_folder

if TYPE_CHECKING:
    from qtool.calibration.sensitivity import Effects
    from qtool.inputs.panels import Panel

SCHEMA_VERSION: Final = 1
BASE_RECIPE: Final = "nvfp4-w4a16-calibrated"
_TRIES: Final = 4
_BUDGET: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(?:bpw)?", re.IGNORECASE)

# Options and results.


def parse_budget(text: str) -> float:
    """Bits per weight in a text such as 5.0bpw or 5.5. Raises UsageError."""
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"Invalid --budget {text!r}: expected bits per weight.", "For example 5.0bpw.")
    return float(match[1])


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """The options of `qtool tune`; one of `budget`, such as "5.0bpw", and `max_drift` is given.

    `recipe` is the one whose groups may stay; `data`, `effort` and `memory` are those of `quantize`, and `limit` takes the
    first queries of each set.
    """

    model: str
    output: Path | None = None
    budget: str | None = None
    max_drift: float | None = None
    recipe: str = BASE_RECIPE
    data: tuple[str, ...] = ()
    limit: int | None = None
    effort: Effort | None = None
    memory: Memory = "auto"
    task: Task | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    force: bool = False
    dry_run: bool = False

    def check(self) -> float | None:
        """The budget in bits per weight, if one was given. Raises UsageError for what cannot be asked."""
        if (self.budget is None) == (self.max_drift is None):
            found = "Missing --budget." if self.budget is None else "--budget cannot be combined with --max-drift."
            raise UsageError(found, "Pass --budget 5.0bpw, or --max-drift 0.02.")
        if self.max_drift is not None and not 0 < self.max_drift < float("inf"):
            raise UsageError(f"Invalid --max-drift {self.max_drift:g}: expected a number above 0.")
        if self.output is not None and not self.dry_run:
            check_target(self.output, force=self.force)
        return None if self.budget is None else parse_budget(self.budget)

    @property
    def quantizing(self) -> QuantizeOptions:
        """How the model is quantized by the base recipe; one without data is tuned on data nevertheless."""
        is_fitted = load_recipe(self.recipe).recipe.calibration is not None
        return QuantizeOptions(
            model=self.model,
            recipe=self.recipe,
            data=self.data if is_fitted else (),
            effort=self.effort,
            memory=self.memory,
            task=self.task,
            revision=self.revision,
            token=self.token,
        )


@dataclass(frozen=True)
class TunedGroup:
    """A fused group: what rounding it alone moves the answers by, to first order, and whether it stays.

    `gguf_type` is the type that llama.cpp's matrices get for the same bits; None where they cannot be K-quants.
    """

    group: str
    weights: int
    raw: float
    centred: float
    relative_error: float
    gguf_type: str | None
    kept: bool


@dataclass(frozen=True, repr=False)
class Tuned(Result):
    """What was found: `bits_per_weight` of the linears that the base recipe quantizes, `model_bits_per_weight` of all.

    `measured` are answers to `held_out` questions, that of the recipe found last; `predicted` is the drift (bits, centred)
    of `max` rounding with ever more groups kept, to first order. `met`: whether `max_drift` was reached. Of a dry run only
    `seconds` is predicted, and nothing is measured.
    """

    architecture: str
    task: str
    base: str
    name: str
    unit: str
    data: str
    prompts: int
    held_out: int
    budget: float | None
    max_drift: float | None
    bits_per_weight: float
    model_bits_per_weight: float
    groups: tuple[TunedGroup, ...]
    measured: tuple[Measured, ...]
    predicted: tuple[tuple[float, float], ...]
    met: bool
    warnings: tuple[str, ...]
    output: Path | None
    seconds: float

    @property
    def kept(self) -> tuple[str, ...]:
        """The groups that stay."""
        return tuple(each.group for each in self.groups if each.kept)

    @property
    @override
    def headline(self) -> str:
        if not self.measured:
            return f"{self.architecture}, task {self.task}: tuning would take about {self.seconds:.0f} s."
        return (
            f"{self.architecture}, task {self.task}: {counted(len(self.kept), 'fused group')} of {len(self.groups)} stay, "
            f"{self.bits_per_weight:.2f} bits per weight of the linears, {self.model_bits_per_weight:.2f} of the model; "
            f"drift {self.measured[-1].centred:.4g} (centred)."
        )

    @override
    def records(self) -> list[dict[str, Any]]:
        return [asdict(each) for each in self.groups]

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "output": str(self.output) if self.output else None}


# The job.


Pages = Callable[[Tuned], Mapping[str, str]]
"""Files for people that are written beside the recipe, by name."""


def tune(options: TuneOptions, progress: StageProgress = ignore, pages: Pages = lambda _: {}) -> Tuned:
    """Find a recipe for `options.model` and write it into the folder `options.output`; a dry run only predicts the time."""
    budget = options.check()
    require_extra("score", "Tuning")
    started = time.monotonic()
    tuner = _opened(options, budget, progress)
    if options.dry_run or options.output is None:
        return tuner.dry_run()
    require_space(options.output, 2 * tuner.job.output_bytes)  # one artefact at a time, and its streams
    with staged_folder(options.output, force=options.force) as folder:
        with TemporaryDirectory(dir=folder) as scratch:
            found, texts = tuner.run(Path(scratch))
        result = replace(found, seconds=round(time.monotonic() - started, 1), output=options.output)
        for name, text in {**texts, **pages(result)}.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "tune.json").write_bytes(json_bytes(result.to_dict()))
        (folder / MANIFEST).write_bytes(json_bytes(_manifest(tuner, result)))
    return result


def _opened(options: TuneOptions, budget: float | None, progress: StageProgress) -> _Tuner:
    job = prepare_quantization(options.quantizing)
    opened = CheckpointArtefact(job.source, options.task)
    task = opened.detection.require_task()
    fitted, held_out = divided(load_calibration(options.data or default_sets(opened), options.limit))
    return _Tuner(options, budget, progress, job, opened, task, fitted, held_out)


def _manifest(tuner: _Tuner, result: Tuned) -> Mapping[str, Any]:
    source = tuner.job.source
    return manifest(
        "tune",
        versions=versions("numpy", "numba", "torch", "transformers"),
        source={"origin": source.origin, "revision": source.revision},
        recipe={"name": result.name, "base": result.base},
        data={"name": tuner.fitted.name, "sha256": tuner.fitted.sha256},
    )


@dataclass(frozen=True)
class _Tuner:
    """What is known before a weight is read: the plan of the base recipe, and the data in two parts."""

    options: TuneOptions
    budget: float | None
    progress: StageProgress
    job: QuantizeJob
    opened: CheckpointArtefact
    task: Task
    fitted: Panel
    held_out: Panel

    def run(self, scratch: Path) -> tuple[Tuned, Mapping[str, str]]:
        """The result, and the recipe and the types of llama.cpp as texts of files."""
        effects, prompts = self._effects()
        groups = candidates(self.job.plan, effects)
        chosen = None if self.budget is None else within(groups, self.budget)
        search = _Search(self, groups, effects, HeldOut(
            self.opened, self.fitted, self.held_out, self.options.quantizing, scratch, self.progress
        ))  # fmt: skip
        kept, met = search.measure(chosen)
        bits = bits_per_weight(groups, kept)
        types = self._types(groups, self.budget or bits)
        name = search.name(kept)
        texts = {RECIPE: search.text(kept, about=list(self._about(search.measured, kept, groups)))}
        if types:
            lines = tensor_types(self.job.plan.groups, types, self.job.plan.detection.family.gguf_names.of)
            texts[TENSOR_TYPES] = "".join(f"{line}\n" for line in lines)
        plan = plan_quantization(self.opened.checkpoint, self.opened.detection, parse_recipe(texts[RECIPE]).recipe)
        order = ranked(groups)
        found = Tuned(
            architecture=self.opened.detection.architecture.name,
            task=self.task.value,
            base=self.job.plan.recipe.name,
            name=name,
            unit=self.unit,
            data=self.fitted.name,
            prompts=prompts,
            held_out=len(self.held_out.queries),
            budget=self.budget,
            max_drift=self.options.max_drift,
            bits_per_weight=bits,
            model_bits_per_weight=plan.bits_per_weight,
            groups=tuple(_tuned(each, kept, types) for each in groups),
            measured=tuple(search.measured),
            predicted=tuple(search.predicted(count) for count in range(len(order) + 1)),
            met=met,
            warnings=tuple(search.warnings),
            output=None,
            seconds=0.0,
        )
        return found, texts

    @property
    def unit(self) -> str:
        """What drifts."""
        return "log-odds" if self.task is Task.RERANK else "vectors"

    def dry_run(self) -> Tuned:
        """A prediction of the time, from a layer of each part of the work."""
        from qtool.calibration.tune_model import opened_sensitivity

        with opened_sensitivity(self.opened, self.job, self.fitted, self.options, ignore, encodes=False) as sensitivity:
            seconds, prompts = sensitivity.probe_seconds(), len(sensitivity.spans)
        if self.job.plan.recipe.calibration is not None:
            summary = quantize_calibrated(replace(self.options.quantizing, dry_run=True), data=self.fitted)
            times = 2 if self.budget is not None else 1 + _TRIES
            seconds += times * (summary.calibration.seconds if summary.calibration else 0)
        detection = self.opened.detection
        return Tuned(
            detection.architecture.name, self.task.value, self.job.plan.recipe.name, "", self.unit, self.fitted.name, prompts,
            len(self.held_out.queries), self.budget, self.options.max_drift, 0.0, 0.0, (), (), (), False, (), None,
            round(seconds, 1),
        )  # fmt: skip

    def _effects(self) -> tuple[Effects, int]:
        from qtool.calibration.tune_model import opened_sensitivity

        with opened_sensitivity(self.opened, self.job, self.fitted, self.options, self.progress) as sensitivity:
            return sensitivity.effects(), len(sensitivity.spans)

    def _types(self, groups: Sequence[Candidate], budget: float) -> Mapping[str, Level]:
        columns = {member.source.shape[1] for members in self.job.plan.groups.values() for member in members}
        return {} if any(each % SUPER_BLOCK for each in columns) else levels_within(groups, budget)

    def _about(self, measured: Sequence[Measured], kept: Sequence[str], groups: Sequence[Candidate]) -> Iterator[str]:
        asked = f"--budget {self.budget:g}bpw" if self.budget else f"--max-drift {self.options.max_drift:g}"
        yield f"Found by `qtool tune {asked}` from {self.job.plan.recipe.name}, on {self.fitted.name}."
        yield f"Drift of the {self.unit} on {counted(len(self.held_out.queries), 'query')} held out, RMS centred (raw):".replace(
            "querys", "queries"
        )
        for each in measured:
            yield f"  {each.name}, {each.bits:.2f} bits per weight of the linears: {each.centred:.4g} ({each.raw:.4g})"
        yield f"Kept are {len(kept)} of {len(groups)} fused groups, those that avoid most drift for each bit first."


def _tuned(each: Candidate, kept: Sequence[str], types: Mapping[str, Level]) -> TunedGroup:
    gguf_type = types[each.group].name if types else None
    return TunedGroup(
        each.group, each.weights, each.raw, each.centred, each.relative_error, gguf_type, each.group in kept
    )


@dataclass
class _Search:
    """Measures the uniform recipes, then the one with groups kept; for a drift, with as few as reach it."""

    tuner: _Tuner
    groups: Sequence[Candidate]
    effects: Effects
    asked: HeldOut
    measured: list[Measured] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def measure(self, chosen: tuple[str, ...] | None) -> tuple[tuple[str, ...], bool]:
        """The groups kept, and whether the drift asked for was reached; the last of `measured` is the recipe found."""
        base, limit = self.tuner.job.recipe.recipe, self.tuner.options.max_drift
        whole = bits_per_weight(self.groups, [each.group for each in self.groups])
        self.measured.append(self.asked.floor(whole))
        if base.calibration is not None:
            self._measure("max", (), is_max=True)
        uniform = self._measure(base.name, ())
        if chosen is None:
            return self._within_drift(float(limit or 0), uniform)
        if base.calibration is not None:
            self._measure(f"max, {bits_per_weight(self.groups, chosen):.2f} bits", chosen, is_max=True)
        self._measure(self.name(chosen), chosen)
        return chosen, True

    def _within_drift(self, limit: float, uniform: Measured) -> tuple[tuple[str, ...], bool]:
        if uniform.centred <= limit:
            return (), True
        count, found = 0, uniform
        for _ in range(_TRIES):
            # What calibration leaves of the drift that is predicted for `max` changes little with what is kept.
            share = found.centred / max(self.predicted(count)[1], 1e-12)
            last = len(self.groups)
            count = next((n for n in range(count + 1, last) if share * self.predicted(n)[1] <= limit), last)
            found = self._measure(self.name(self._first(count)), self._first(count))
            if found.centred <= limit or count == last:
                break
        return self._first(count), found.centred <= limit

    def _first(self, count: int) -> tuple[str, ...]:
        return tuple(each.group for each in ranked(self.groups)[:count])

    def predicted(self, count: int) -> tuple[float, float]:
        """Bits per weight, and to first order the drift (centred) under `max`, with the first groups kept."""
        kept = self._first(count)
        rest = [each.group for each in self.groups if each.group not in kept]
        return bits_per_weight(self.groups, kept), self.effects.drift(rest)[1]

    def name(self, kept: Sequence[str]) -> str:
        """What the recipe with these groups kept is called."""
        base = self.tuner.job.plan.recipe.name
        return f"{base}-{bits_per_weight(self.groups, kept):.2f}bpw" if kept else base

    def text(self, kept: Sequence[str], *, is_max: bool = False, about: Sequence[str] = ()) -> str:
        """The recipe with these groups kept."""
        recipe = plain_max(self.tuner.job.plan.recipe) if is_max else self.tuner.job.plan.recipe
        chosen = [each for each in ranked(self.groups) if each.group in kept]
        return recipe_text(recipe, self.name(kept), chosen, self.tuner.unit, about)

    def _measure(self, name: str, kept: Sequence[str], *, is_max: bool = False) -> Measured:
        found, warnings = self.asked.measure(name, self.text(kept, is_max=is_max), bits_per_weight(self.groups, kept))
        self.measured.append(found)
        self.warnings += [each for each in warnings if each not in self.warnings]
        return found
