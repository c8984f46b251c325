"""The command that serves an artefact as qtool scores it; what an engine cannot do with one is an error that says so.

Read in vLLM 0.32, SGLang 0.5.23 and llama.cpp's server of November 2026; docs/serving.md says what was run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final

from qtool.arch.detect import Detection
from qtool.arch.families import SEEN_IN
from qtool.arch.prompts import FILE_NAME, Truncation, rerank_template
from qtool.arch.spec import Task
from qtool.artefact import Artefact, CheckpointArtefact, GgufArtefact, open_artefact, require_fit
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import OFFICIAL_LIMITS
from qtool.scoring.llama_cpp.model import LlamaCppModel, repair_command, scoring_model

_PIXELS: Final = {"min_pixels": OFFICIAL_LIMITS.min_pixels, "max_pixels": OFFICIAL_LIMITS.max_pixels}
_LM_HEAD: Final = "lm_head"
_TOKENS_OF_PICTURES: Final = tuple(
    str(pixels // OFFICIAL_LIMITS.factor**2) for pixels in (OFFICIAL_LIMITS.min_pixels, OFFICIAL_LIMITS.max_pixels)
)


class ServingEngine(Enum):
    """Who is to serve."""

    VLLM = "vllm"
    LLAMA_SERVER = "llama-server"
    SGLANG = "sglang"


@dataclass(frozen=True)
class ServeCommand:
    """A command line; `notes` say what its user must know, `template` is the file that must lie where the command looks."""

    argv: tuple[str, ...]
    notes: tuple[str, ...] = ()
    template: tuple[Path, str] | None = None

    @property
    def line(self) -> str:
        """As a shell takes it."""
        return shlex.join(self.argv)

    def to_json(self) -> Mapping[str, Any]:
        """For `--json`."""
        return {"schema_version": 1, "command": self.line, "argv": list(self.argv), "notes": list(self.notes)}


def serve_command(
    artefact: str | Artefact,
    engine: ServingEngine,
    port: int | None,
    task: Task | None,
    template: Path | None,
    mmproj: Path | None = None,
) -> ServeCommand:
    """How `engine` serves `artefact`; a reranker's chat template is looked for at `template`, by default beside its weights.

    `mmproj` is a GGUF embedder's projector, by default the fitting one beside it. What lies on the hub is downloaded, and the
    command names it where it then lies.
    """
    opened = open_artefact(artefact, task=task, mmproj=mmproj) if isinstance(artefact, str) else artefact
    if isinstance(opened, GgufArtefact):
        made = _llama_server(opened, engine)
    else:
        made = _of_checkpoint(opened, engine, template)
    return made if port is None else replace(made, argv=(*made.argv, "--port", str(port)))


def parse_engine(name: str) -> ServingEngine:
    """The engine that --engine names."""
    if name not in {engine.value for engine in ServingEngine}:
        known = ", ".join(engine.value for engine in ServingEngine)
        raise UsageError(f"Unknown engine {name!r}.", f"Pass one of {known} as --engine.")
    return ServingEngine(name)


def with_template(command: ServeCommand, *, write: bool) -> ServeCommand:
    """The command once its chat template is there; `write` puts the official one there, and replaces no other file."""
    if command.template is None:
        if write:
            raise UsageError(
                "--write-template applies to checkpoints of rerankers only.", "Leave out --write-template."
            )
        return command
    path, official = command.template
    if write and not path.exists():
        path.write_text(official, encoding="utf-8")
    if not path.is_file():
        raise UsageError(
            f"The chat template {path} is missing; without it the engine does not score the official prompt.",
            f"Pass --write-template {FILE_NAME} to have it written there.",
        )
    if path.read_text(encoding="utf-8", errors="replace").strip() == official.strip():
        return command
    return replace(command, notes=(*command.notes, f"{path} is not the template of the official prompt."))


def _llama_server(artefact: GgufArtefact, engine: ServingEngine) -> ServeCommand:
    gguf = artefact.path
    if engine is not ServingEngine.LLAMA_SERVER:
        raise UsageError(f"{gguf} is a GGUF file, which {engine.value} does not serve.", "Use --engine llama-server.")
    model = scoring_model(artefact.model)
    _require_served_rightly(model)
    length = str(_context_size(model.prompt.truncation))
    argv = ["llama-server", "--model", str(gguf), "--ctx-size", length]
    if model.task is Task.RERANK:
        if artefact.mmproj is not None:
            raise UsageError(
                f"{gguf} is a reranker: llama-server ranks texts only and takes no projector.", "Leave out --mmproj."
            )
        # A rank-pooled prompt must fit into one physical batch.
        return ServeCommand((*argv, "--batch-size", length, "--ubatch-size", length, "--rerank"), _rank_notes(model))
    argv += ["--embedding", "--pooling", "last"]
    projector = artefact.projector
    if projector is not None:
        require_fit(projector, model.file, model.family)
        low, high = _TOKENS_OF_PICTURES
        argv += ["--mmproj", str(projector.path), "--image-min-tokens", low, "--image-max-tokens", high]
    missing = model.prompt.sees_pictures and projector is None
    notes = (f"There is no fitting projector beside {gguf.name}, so this serves texts only.",) if missing else ()
    return ServeCommand(tuple(argv), notes)


def _require_served_rightly(model: LlamaCppModel) -> None:
    """Raise ModelError for what llama.cpp would load and score wrongly without an error."""
    scales = [name for name in model.file.nvfp4_scales if name in model.file.tensors]
    if model.family.scales_ignored_among(scales):
        raise ModelError(
            f"{model.path}: llama.cpp (seen up to {SEEN_IN}) ignores the feed-forward scales of "
            f"{model.family.gguf_architecture} in NVFP4, so scores would be wrong or not finite.",
            "Serve another type: qtool convert-gguf MODEL -o OUT --outtype q8_0",
        )
    if (other := model.other_familys_prompt) is not None:
        whose = "vision" if other.sees_pictures else "text"
        raise ModelError(
            f"{model.path} has the prompt of the {whose} family baked in: its scores would drift from the official ones.",
            f"Repair it: {repair_command(model.file)}",
        )


def _context_size(rule: Truncation) -> int:
    """The context for the longest official prompt: llama.cpp takes prompts that are shorter than it."""
    return rule.max_length + (rule.kept_tail if rule.tail_is_extra else 0) + 1


def _rank_notes(model: LlamaCppModel) -> tuple[str, ...]:
    notes = [] if not model.prompt.sees_pictures else ["llama-server's /v1/rerank takes texts only."]
    if model.baked_instruction is None:
        notes.append(
            f"The prompt baked into the file is not the official one, which this puts in: {repair_command(model.file)}"
        )
    return tuple(notes)


def _of_checkpoint(artefact: CheckpointArtefact, engine: ServingEngine, template: Path | None) -> ServeCommand:
    folder = artefact.path
    if engine is ServingEngine.LLAMA_SERVER:
        raise UsageError(
            f"{folder} is a checkpoint; llama-server needs a GGUF file.",
            f"Convert it: qtool convert-gguf {folder} -o OUT",
        )
    found = artefact.detection
    command = (_vllm if engine is ServingEngine.VLLM else _sglang)(folder, found)
    if found.require_task() is Task.EMBED:
        return command
    path = template or folder / FILE_NAME
    official = rerank_template(found.family.reranker)
    return replace(command, argv=(*command.argv, "--chat-template", str(path)), template=(path, official))


def _vllm(folder: Path, found: Detection) -> ServeCommand:
    argv = ["vllm", "serve", str(folder), "--runner", "pooling"]
    argv += ["--quantization", "modelopt"] if _is_quantized(found) else []
    if found.require_task() is Task.RERANK and found.architecture.head == _LM_HEAD:
        argv += ["--hf-overrides", json.dumps(found.family.vllm_overrides)]
    if found.architecture.is_vision:
        argv += ["--mm-processor-kwargs", json.dumps(_PIXELS)]
    return ServeCommand(tuple(argv))


def _sglang(folder: Path, found: Detection) -> ServeCommand:
    argv = ["python", "-m", "sglang.launch_server", "--model-path", str(folder)]
    argv += ["--quantization", "modelopt_fp4"] if _is_quantized(found) else []
    if found.architecture.is_vision:
        argv += ["--mm-process-config", json.dumps({"image": _PIXELS})]
    if found.require_task() is Task.EMBED:
        notes = ["Pictures come as SGLang's own `input` of text and image, under the chat template's own instruction."]
        return ServeCommand((*argv, "--is-embedding"), tuple(notes if found.architecture.is_vision else []))
    if found.architecture.head != _LM_HEAD:
        raise UsageError(
            f"{folder} ranks with a score head, and SGLang gives such models no prompt.", "Serve it with --engine vllm."
        )
    notes = ["SGLang ranks by the first answer's probabilities; ask for POST /v1/rerank."]
    if found.architecture.is_vision:
        notes.append("It scores 0 where neither yes nor no is among the 50 likeliest answers.")
    return ServeCommand((*argv, "--disable-radix-cache"), tuple(notes))


def _is_quantized(found: Detection) -> bool:
    quantization = found.config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == "modelopt"
