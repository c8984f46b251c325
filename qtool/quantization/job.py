"""What is asked for, and everything that is known about it before the first weight is read.

Rule: preparing a job reads configs and headers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from qtool.arch.detect import Detection, detect
from qtool.arch.prompts import reranker_prompt
from qtool.arch.rerank_template import FILE_NAME as RERANK_TEMPLATE
from qtool.arch.rerank_template import rerank_template
from qtool.arch.spec import Task
from qtool.checkpoint.layout import Layout, lay_out
from qtool.checkpoint.reader import INDEX, Checkpoint, open_checkpoint
from qtool.checkpoint.sidecars import find_sidecars
from qtool.checkpoint.source import Source, resolve
from qtool.checkpoint.writer import check_target
from qtool.jsonfile import json_bytes
from qtool.quantization.plan import QuantizationPlan, plan_quantization
from qtool.quantization.quant_config import hf_quant_config, quantized_config
from qtool.recipe import LoadedRecipe, load_recipe

Backend = Literal["auto", "streaming", "modelopt"]
BACKENDS: Final[tuple[Backend, ...]] = ("auto", "streaming", "modelopt")
DEFAULT_MAX_SHARD_BYTES: Final = 1 << 29
"""Shards are hashed side by side and fetched side by side, so several of half a gigabyte beat one of five."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What `qtool quantize` is asked to do."""

    model: str
    output: Path | None
    recipe: str = "nvfp4-w4a16"
    backend: Backend = "auto"
    task: Task | None = None
    revision: str | None = None
    token: str | None = None
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Job:
    """Everything known before the first weight is read."""

    source: Source
    checkpoint: Checkpoint
    recipe: LoadedRecipe
    plan: QuantizationPlan
    layout: Layout
    backend: Literal["streaming", "modelopt"]
    backend_reason: str
    small_files: Mapping[str, bytes]

    @property
    def sidecars(self) -> list[Path]:
        """Side files of the source, relative to it."""
        return find_sidecars(self.checkpoint.directory)

    @property
    def output_bytes(self) -> int:
        """Bytes of the output folder, qtool.json excepted."""
        sidecar_bytes = sum((self.checkpoint.directory / path).stat().st_size for path in self.sidecars)
        return self.layout.nbytes + sum(map(len, self.small_files.values())) + sidecar_bytes


def prepare(options: QuantizeOptions) -> Job:
    """Resolve, open and plan."""
    if options.output is not None and not options.dry_run:
        check_target(options.output, force=options.force)
    recipe = load_recipe(options.recipe)
    source = resolve(options.model, options.revision, options.token)
    checkpoint = open_checkpoint(source.directory)
    plan = plan_quantization(checkpoint, detect(source.directory, options.task), recipe.recipe)
    layout = lay_out(plan.outputs, options.max_shard_bytes)
    backend, reason = _choose(options.backend)
    return Job(source, checkpoint, recipe, plan, layout, backend, reason, _small_files(plan, layout))


def _choose(backend: Backend) -> tuple[Literal["streaming", "modelopt"], str]:
    if backend == "auto":  # every algorithm that the recipe schema admits is one that streaming carries out
        return "streaming", "auto: the recipe's algorithm needs no model in memory"
    return backend, "--backend"


def _small_files(plan: QuantizationPlan, layout: Layout) -> Mapping[str, bytes]:
    return {
        "config.json": json_bytes(quantized_config(plan)),
        "hf_quant_config.json": json_bytes(hf_quant_config(plan)),
        **({INDEX: layout.index} if layout.index else {}),
        **_rerank_template(plan.detection),
    }


def _rerank_template(detection: Detection) -> Mapping[str, bytes]:
    """What vLLM needs as --chat-template; a model with a `score` head may have been trained on another prompt."""
    if detection.task is not Task.RERANK or detection.architecture.head != "lm_head":
        return {}
    prompt = reranker_prompt(is_vision=detection.architecture.is_vision)
    return {RERANK_TEMPLATE: rerank_template(prompt).encode()}
