"""Everything that is known about a conversion before the first weight is read.

Rule: preparing a job reads configs, headers and the tokenizer only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtool.arch.detect import Detection, detect
from qtool.arch.prompts import reranker_prompt
from qtool.arch.spec import Task
from qtool.checkpoint.reader import open_checkpoint
from qtool.checkpoint.source import Source, resolve
from qtool.convert.files import Namer, PlannedFile, language_files, projector_file
from qtool.convert.options import NO_PROJECTOR, ConvertOptions
from qtool.convert.plan import Inventory, require_rankable, take_inventory
from qtool.convert.templates import rank_prompt
from qtool.convert.types import LLAMA_QUANTIZE_TYPES
from qtool.errors import UsageError


@dataclass(frozen=True)
class Job:
    """Everything known before the first weight is read; `quantized` are the types that llama.cpp makes, and their files."""

    source: Source
    inventory: Inventory
    task: Task
    rank_template: str | None
    files: tuple[PlannedFile, ...]
    quantized: Mapping[str, str]


def prepare(options: ConvertOptions) -> Job:
    """Resolve, open, plan and lay out."""
    options.check()
    source = resolve(options.model, options.revision, options.token)
    detection = detect(source.directory, options.task)
    task = detection.require_task()
    require_rankable(detection)
    inventory = take_inventory(open_checkpoint(source.directory), detection)
    namer = Namer(options.output, source)
    template = _rank_template(options, detection, task)
    files = list(language_files(options, source, inventory, task, template, namer))
    if detection.architecture.is_vision and options.mmproj != NO_PROJECTOR:
        files.append(projector_file(options.mmproj, source, inventory, namer))
    quantized = {name: namer.language(name.upper()) for name in options.outtypes if name in LLAMA_QUANTIZE_TYPES}
    return Job(source, inventory, task, template, tuple(files), quantized)


def _rank_template(options: ConvertOptions, detection: Detection, task: Task) -> str | None:
    if task is Task.RERANK:
        official = reranker_prompt(is_vision=detection.architecture.is_vision)
        return rank_prompt(official, options.prompt, options.instruction)
    if options.instruction is not None:
        raise UsageError("--instruction is baked into a reranker's prompt; an embedder gets it with each request.")
    return None
