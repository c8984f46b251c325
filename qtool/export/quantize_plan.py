"""Decides, from headers alone, what happens to every tensor of a checkpoint, and what the output declares.

Each tensor is claimed by exactly one rule of the recipe; anything else is an error, raised before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Final

from qtool.arch.detect import Detection, known_modules
from qtool.arch.spec import Architecture, Presence, TensorSpec
from qtool.errors import ModelError, UsageError
from qtool.formats.floats import FLOAT_FORMATS
from qtool.recipe import Recipe
from qtool.storage.checkpoint import Checkpoint, TensorInfo, named_tensors, require_shape
from qtool.storage.packed import BLOCK_SCALE, GLOBAL_SCALE, PACKED
from qtool.storage.shards import OutputTensor

_TIED_REASON: Final = "tied: engines read the embedding instead, and ModelOpt leaves the copy out"


class Action(str, Enum):
    """What happens to a source tensor."""

    QUANTIZE = "quantize"
    COPY = "copy"
    DROP = "drop"


@dataclass(frozen=True)
class PlannedTensor:
    """One source tensor, what becomes of it, and by which rule: its patterns, and why it is so."""

    spec: TensorSpec
    source: TensorInfo
    action: Action
    rule: str
    reason: str

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.source.nbytes // FLOAT_FORMATS[self.source.dtype].itemsize

    def outputs(self, block_size: int) -> tuple[OutputTensor, ...]:
        """The tensors that are written for it."""
        if self.action is Action.DROP:
            return ()
        name, module = self.spec.hf_name, self.spec.module
        if self.action is Action.COPY:
            return (OutputTensor(name, self.source.dtype, self.source.shape, self.source.nbytes),)
        rows, columns = self.source.shape
        return (
            OutputTensor(name, PACKED, (rows, columns // 2), rows * columns // 2),
            OutputTensor(
                f"{module}{BLOCK_SCALE}", "F8_E4M3", (rows, columns // block_size), rows * columns // block_size
            ),
            OutputTensor(f"{module}{GLOBAL_SCALE}", "F32", (), 4),
        )


@dataclass(frozen=True)
class QuantizationPlan:
    """What happens to every tensor, and which modules the quantized checkpoint declares as unquantized."""

    detection: Detection
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    exclude_modules: tuple[str, ...]

    @property
    def outputs(self) -> Iterator[OutputTensor]:
        """All output tensors, in source order."""
        for tensor in self.tensors:
            yield from tensor.outputs(self.recipe.block_size)

    @property
    def groups(self) -> Mapping[str, tuple[PlannedTensor, ...]]:
        """The quantized tensors by fused group; each group shares one global scale."""
        groups: dict[str, tuple[PlannedTensor, ...]] = {}
        for tensor in self.tensors:
            if tensor.action is Action.QUANTIZE:
                groups[tensor.spec.fused_group] = (*groups.get(tensor.spec.fused_group, ()), tensor)
        return groups

    @property
    def bits_per_weight(self) -> float:
        """Output bits, scales included, over the number of weights that remain."""
        weights = sum(t.elements for t in self.tensors if t.action is not Action.DROP)
        return 8 * sum(o.nbytes for o in self.outputs) / weights


def plan_quantization(checkpoint: Checkpoint, detection: Detection, recipe: Recipe) -> QuantizationPlan:
    """The plan for `checkpoint` under `recipe`; raises ModelError or UsageError where there can be none."""
    _refuse_quantized(checkpoint)
    found = named_tensors(checkpoint.tensors.values(), detection.architecture, checkpoint.config)
    tensors = tuple(_plan_tensor(spec, source, recipe) for spec, source in found.items())
    _refuse_dead_patterns(recipe, known_modules() | {t.spec.module for t in tensors})
    _refuse_dead_groups(recipe, tensors)
    _require_matches(recipe, tensors)
    plan = QuantizationPlan(detection, recipe, tensors, _excluded(detection.architecture, tensors))
    _require_whole_groups(plan)
    return plan


def _plan_tensor(spec: TensorSpec, source: TensorInfo, recipe: Recipe) -> PlannedTensor:
    if source.dtype not in FLOAT_FORMATS:
        raise ModelError(
            f"{source.hf_name} has the type {source.dtype}; expected one of {', '.join(FLOAT_FORMATS)}.",
            "Quantize a checkpoint of floating-point weights.",
        )
    require_shape(spec, source)
    if spec.presence is Presence.DUPLICATE:
        return PlannedTensor(spec, source, Action.DROP, spec.module, _TIED_REASON)
    action, rule, reason = _claim(spec, recipe)
    if action is Action.QUANTIZE and source.shape[-1] % recipe.block_size:
        raise ModelError(
            f"{source.hf_name} {list(source.shape)} has {source.shape[-1]} columns; expected a multiple of the block size "
            f"{recipe.block_size} (rule {rule!r} of {recipe.name}).",
            "Keep the module unquantized, in a recipe of your own.",
        )
    return PlannedTensor(spec, source, action, rule, reason)


def _claim(spec: TensorSpec, recipe: Recipe) -> tuple[Action, str, str]:
    quantizing = [p for p in recipe.quantize if fnmatchcase(spec.module, p)]
    keeping = [k for k in recipe.keep if any(fnmatchcase(spec.module, p) for p in k.modules or ())]
    taken_out = [
        k for k in recipe.keep if spec.fused_group and any(fnmatchcase(spec.fused_group, p) for p in k.groups or ())
    ]
    if taken_out and quantizing and not keeping:
        quantizing, keeping = [], taken_out
    if len(quantizing) + len(keeping) != 1:
        claims = len(quantizing) + len(keeping)
        problem = f"{claims} rules claim" if claims else "no rule claims"
        raise UsageError(
            f"Recipe {recipe.name}: {problem} {spec.module} {list(spec.shape)}; expected exactly one.",
            "Name the module in one rule, under `quantize` or `keep`.",
        )
    if keeping:
        return Action.COPY, ", ".join(keeping[0].patterns), keeping[0].reason
    if not spec.hf_name.endswith(".weight"):
        return Action.COPY, quantizing[0], "a bias is one vector; engines read it in 16 bits"
    if not spec.fused_group:
        raise UsageError(
            f"Recipe {recipe.name} quantizes {spec.module}, which every engine reads unquantized.",
            "Name the module under `keep`.",
        )
    return Action.QUANTIZE, quantizing[0], recipe.scheme


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    declared: Any = checkpoint.config.get("quantization_config")
    if declared is not None or (checkpoint.directory / "hf_quant_config.json").exists():
        method = declared.get("quant_method", "unknown") if isinstance(declared, Mapping) else "hf_quant_config.json"
        raise ModelError(
            f"The checkpoint is already quantized ({method}).", "Quantize the original checkpoint instead."
        )


def _refuse_dead_patterns(recipe: Recipe, modules: frozenset[str]) -> None:
    for pattern in (*recipe.quantize, *(p for keep in recipe.keep for p in keep.modules or ())):
        if not any(fnmatchcase(module, pattern) for module in modules):
            raise UsageError(
                f"Recipe {recipe.name}: the pattern {pattern!r} matches no module of any known architecture.",
                "Correct the pattern, or remove it.",
            )


def _refuse_dead_groups(recipe: Recipe, tensors: tuple[PlannedTensor, ...]) -> None:
    groups = {t.spec.fused_group: t.spec.module for t in tensors if t.spec.fused_group}
    for pattern in (p for keep in recipe.keep for p in keep.groups or ()):
        if any(fnmatchcase(group, pattern) for group in groups):
            continue
        whole = next(
            (t.spec.fused_group for t in tensors if t.spec.fused_group and fnmatchcase(t.spec.module, pattern)), ""
        )
        raise UsageError(
            f"Recipe {recipe.name}: {pattern!r} under `groups` matches no fused group of this checkpoint.",
            f"Engines merge that module into {whole}; name that." if whole else f"Groups are named as {min(groups)}.",
        )


def _require_matches(recipe: Recipe, tensors: tuple[PlannedTensor, ...]) -> None:
    used = {t.rule for t in tensors if t.action is Action.QUANTIZE}
    modules = {t.spec.module for t in tensors if t.spec.fused_group}
    for pattern in recipe.quantize:
        if pattern not in used and not any(fnmatchcase(module, pattern) for module in modules):
            raise UsageError(
                f"Recipe {recipe.name}: the pattern {pattern!r} matches nothing in this checkpoint.",
                "Remove the pattern, or quantize a checkpoint that it was written for.",
            )


def _require_whole_groups(plan: QuantizationPlan) -> None:
    sizes: dict[str, int] = {}
    for spec in plan.detection.architecture.tensors(plan.detection.config):
        if spec.fused_group:
            sizes[spec.fused_group] = sizes.get(spec.fused_group, 0) + 1
    for group, members in plan.groups.items():
        if len(members) != sizes[group]:
            raise UsageError(
                f"Recipe {plan.recipe.name} quantizes part of {group}, which engines merge into one product.",
                "Quantize all of its modules, or none.",
            )
        dtypes = sorted({member.source.dtype for member in members})
        if len(dtypes) > 1:
            raise ModelError(f"The weights of {group} have the types {' and '.join(dtypes)}; expected one type.")


def _excluded(architecture: Architecture, tensors: tuple[PlannedTensor, ...]) -> tuple[str, ...]:
    """`exclude_modules`: the linear and embedding modules that stay, by name, the vision tower as one.

    ModelOpt shortens names of siblings to a pattern, which engines match in ways of their own; names are safe.
    """
    kept = [t.spec for t in tensors if t.spec.fused_group and t.action is Action.COPY]
    renamed = {architecture.kept_pattern(spec.fused_group) for spec in kept} if architecture.kept_pattern else set()
    return tuple(sorted({*architecture.unquantized, *(spec.module for spec in kept), *renamed}))


# The two JSON descriptions by which engines recognise a ModelOpt checkpoint. They equal those that ModelOpt's exporter
# writes, since vLLM and SGLang parse them field by field.


MODELOPT_LAYOUT: Final = "0.47.0"
"""The ModelOpt release whose layout is written. Engines look for its name; `qtool.json` says who did the work."""


def hf_quant_config(plan: QuantizationPlan) -> dict[str, Any]:
    """The contents of hf_quant_config.json."""
    return {
        "producer": {"name": "modelopt", "version": MODELOPT_LAYOUT},
        "quantization": {
            "quant_algo": plan.recipe.scheme,
            "kv_cache_quant_algo": None,
            "group_size": plan.recipe.block_size,
            "exclude_modules": list(plan.exclude_modules),
        },
    }


def quantized_config(plan: QuantizationPlan) -> Mapping[str, Any]:
    """The source's config.json with `quantization_config`, without which vLLM takes the weights for unquantized."""
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": plan.recipe.block_size}
    return {
        **plan.detection.config,
        "quantization_config": {
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": list(plan.exclude_modules),
            "quant_algo": plan.recipe.scheme,
            "producer": {"name": "modelopt", "version": MODELOPT_LAYOUT},
            "quant_method": "modelopt",
        },
    }
