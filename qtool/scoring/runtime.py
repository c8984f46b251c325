"""What a user names, a folder, a model, a GGUF file or a server's address, opened as a scorer."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.arch.spec import Task
from qtool.artefact import Artefact, CheckpointArtefact, GgufArtefact, open_artefact
from qtool.errors import UsageError
from qtool.extras import importing, require_extra
from qtool.options import Memory, Options
from qtool.scoring.llama_cpp.server import VERIFYING, LlamaCppOptions

if TYPE_CHECKING:
    from qtool.scoring.http.runtime import HttpScorer
    from qtool.scoring.llama_cpp.runtime import LlamaCppScorer
    from qtool.scoring.scorer import Scorer

_ADDRESSES: Final = ("http://", "https://")
_DTYPE: Final = "float32"


@dataclass(frozen=True, kw_only=True)
class RuntimeOptions(Options):
    """How to open a model; each runtime heeds what concerns it.

    `task` overrides what the model declares. Checkpoints: `dtype`, `device` (torch's words, or "auto"), `memory` (bytes,
    or a text such as 8GB) in which to run layer by layer, and of hub repositories `revision` and `token`. GGUF models: `mmproj`, by default the fitting projector beside the file, and
    `llama_cpp`. Servers: `engine` and `served_model`, by default what the server says, `concurrency` requests at a time,
    and `timeout` seconds for each; `family` (as `arch` names it), which none tells, decides how items are embedded.
    """

    task: Task | None = None
    dtype: str = _DTYPE
    device: str = "auto"
    memory: Memory = "auto"
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    mmproj: Path | None = None
    llama_cpp: LlamaCppOptions = VERIFYING
    engine: str | None = None
    served_model: str | None = None
    family: str | None = None
    concurrency: int = 8
    timeout: float = 300.0


def open_runtime(target: str | Artefact, options: RuntimeOptions = RuntimeOptions()) -> Scorer:
    """The scorer of `target`: its task, family, identity and query instruction are known before any weight is read."""
    if isinstance(target, str) and target.startswith(_ADDRESSES):
        return _server(target, options)
    artefact = _opened(target, options)
    return _checkpoint(artefact, options) if isinstance(artefact, CheckpointArtefact) else _llama_cpp(artefact, options)


def texts_only(target: str | Artefact, options: RuntimeOptions = RuntimeOptions()) -> str:
    """Why the runtime of `target`, whose model sees pictures, takes none, as a sentence; empty where it takes them."""
    if isinstance(target, str) and target.startswith(_ADDRESSES):
        with closing(_server(target, options)) as server:
            return server.texts_only
    artefact = _opened(target, options)
    if isinstance(artefact, CheckpointArtefact) or artefact.projector is not None:
        return ""
    return f"there is no fitting projector beside {artefact.path.name}."


def _opened(target: str | Artefact, options: RuntimeOptions) -> Artefact:
    if not isinstance(target, str):
        return target
    return open_artefact(
        target, task=options.task, mmproj=options.mmproj, revision=options.revision, token=options.token
    )


def _refuse_memory(what: str, options: RuntimeOptions) -> None:
    if options.memory != "auto":
        raise UsageError(f"{what}; --memory applies to checkpoints only.", "Leave out --memory.")


def _server(url: str, options: RuntimeOptions) -> HttpScorer:
    from qtool.scoring.http.detect import ServerKind
    from qtool.scoring.http.runtime import HttpOptions, open_http

    _refuse_memory(f"{url} is a server", options)
    known = [kind.value for kind in ServerKind]
    if options.engine not in (None, *known):
        raise UsageError(f"Unknown engine {options.engine!r}.", f"Known are {', '.join(known)}.")
    engine = ServerKind(options.engine) if options.engine else None
    http = HttpOptions(engine, options.served_model, options.task, options.family, options.concurrency, options.timeout)
    return open_http(url, http)


def _checkpoint(artefact: CheckpointArtefact, options: RuntimeOptions) -> Scorer:
    require_extra("score", "Scoring a checkpoint")
    with importing("score"):
        from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer

    return open_scorer(artefact, ScorerOptions(options.task, options.dtype, options.device, memory=options.memory))


def _llama_cpp(artefact: GgufArtefact, options: RuntimeOptions) -> LlamaCppScorer:
    from qtool.scoring.llama_cpp.model import scoring_model
    from qtool.scoring.llama_cpp.runtime import llama_cpp_scorer

    if options.dtype != _DTYPE:
        raise UsageError(f"{artefact.path} runs as its file says; --dtype applies to checkpoints only.")
    _refuse_memory(f"{artefact.path} is a GGUF file", options)
    model = scoring_model(artefact.model)
    if options.task not in (None, model.task):
        raise UsageError(f"{artefact.path} is made to {model.task.value}; --task cannot change that.")
    return llama_cpp_scorer(model, artefact.projector, options.llama_cpp)
