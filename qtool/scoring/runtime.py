"""What a user names, a folder, a model, a GGUF file or a server's address, opened as a scorer.

Rule: the name alone says which runtime it is, opening reads no weights, and no other room chooses a runtime.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qtool.errors import ModelError, UsageError
from qtool.extras import require_extra
from qtool.scoring.llama_cpp.server import VERIFYING, LlamaCppOptions

if TYPE_CHECKING:
    from qtool.arch.spec import Task
    from qtool.scoring.http.runtime import HttpScorer
    from qtool.scoring.llama_cpp.model import GgufModel
    from qtool.scoring.llama_cpp.runtime import LlamaCppScorer
    from qtool.scoring.scorer import Scorer

_ADDRESSES: Final = ("http://", "https://")
_SUFFIX: Final = ".gguf"
_CHECKPOINT: Final = "config.json"
_DTYPE: Final = "float32"


@dataclass(frozen=True)
class RuntimeOptions:
    """How to open a model; each runtime heeds what concerns it.

    `task` overrides what the model declares. Checkpoints: `dtype`, `device` (torch's words, or "auto"), and of hub
    repositories `revision` and `token`. GGUF files: `mmproj`, by default the fitting projector beside the file, and `llama_cpp`.
    Servers: `engine` and `served_model`, by default what the server says, `concurrency` requests at a time, and
    `timeout` seconds for each; `family` (as `arch` names it), which none tells, decides how items are embedded.
    """

    task: Task | None = None
    dtype: str = _DTYPE
    device: str = "auto"
    revision: str | None = None
    token: str | None = None
    mmproj: Path | None = None
    llama_cpp: LlamaCppOptions = VERIFYING
    engine: str | None = None
    served_model: str | None = None
    family: str | None = None
    concurrency: int = 8
    timeout: float = 300.0


def open_runtime(target: str, options: RuntimeOptions = RuntimeOptions()) -> Scorer:
    """The scorer of `target`: its task, family, identity and query instruction are known before any weight is read."""
    if target.startswith(_ADDRESSES):
        return _server(target, options)
    gguf = gguf_file(target)
    return _checkpoint(target, options) if gguf is None else _llama_cpp(gguf, options)


def texts_only(target: str, options: RuntimeOptions = RuntimeOptions()) -> str:
    """Why the runtime of `target`, whose model sees pictures, takes none, as a sentence; empty where it takes them."""
    if target.startswith(_ADDRESSES):
        with closing(_server(target, options)) as server:
            return server.texts_only
    gguf = gguf_file(target)
    if gguf is None or options.mmproj is not None:
        return ""
    from qtool.scoring.llama_cpp.model import read_model

    return "" if projector_beside(read_model(gguf)) else f"no projector that fits lies beside {gguf.name}."


def gguf_file(target: str) -> Path | None:
    """The language model's GGUF file where `target` is one, or a folder of them without a checkpoint; else None."""
    path = Path(target)
    if path.suffix == _SUFFIX:
        if not path.is_file():
            raise UsageError(f"There is no file {path}.")
        return path
    if not path.is_dir() or (path / _CHECKPOINT).exists() or not any(path.glob(f"*{_SUFFIX}")):
        return None
    return _only(path, _language_files(path), "language models", f"Name the file: {path}/….gguf.")


def projector_beside(model: GgufModel) -> Path | None:
    """The projector in a model's folder that fits it, None where none does, of several the one with the model's name.

    Raises UsageError where several fit and none is named so.
    """
    folder = model.path.parent
    own = folder / f"mmproj-{model.path.name}"  # as qtool names what it converts together
    if own.is_file() and _fits(own, model):
        return own
    files = [path for path in sorted(folder.glob(f"*{_SUFFIX}")) if _is_projector(path) and _fits(path, model)]
    return _only(folder, files, "projectors", "Choose one with --mmproj.") if files else None


def _server(url: str, options: RuntimeOptions) -> HttpScorer:
    from qtool.scoring.http.detect import ServerKind
    from qtool.scoring.http.runtime import HttpOptions, open_http

    known = [kind.value for kind in ServerKind]
    if options.engine not in (None, *known):
        raise UsageError(f"Unknown engine {options.engine!r}.", f"Known are {', '.join(known)}.")
    engine = ServerKind(options.engine) if options.engine else None
    http = HttpOptions(engine, options.served_model, options.task, options.family, options.concurrency, options.timeout)
    return open_http(url, http)


def _checkpoint(target: str, options: RuntimeOptions) -> Scorer:
    require_extra("score", "Scoring a checkpoint")
    from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer
    from qtool.storage.hub import resolve

    if options.mmproj is not None:
        raise UsageError(f"{target} is no GGUF file, and --mmproj belongs to those.")
    directory = resolve(target, options.revision, options.token).directory
    return open_scorer(directory, ScorerOptions(options.task, options.dtype, options.device))


def _llama_cpp(gguf: Path, options: RuntimeOptions) -> LlamaCppScorer:
    from qtool.scoring.llama_cpp.model import read_model
    from qtool.scoring.llama_cpp.runtime import llama_cpp_scorer

    if options.dtype != _DTYPE:
        raise UsageError(f"{gguf} is run as its file says; --dtype belongs to checkpoints.")
    model = read_model(gguf)
    if options.task not in (None, model.task):
        raise UsageError(f"{gguf} is made to {model.task.value}; --task cannot change that.")
    return llama_cpp_scorer(model, options.mmproj or projector_beside(model), options.llama_cpp)


def _language_files(folder: Path) -> list[Path]:
    from qtool.scoring.llama_cpp.model import parts_of

    files = [path for path in sorted(folder.glob(f"*{_SUFFIX}")) if not _is_projector(path)]
    later = {part for path in files for part in parts_of(path)[1:]}
    return [path for path in files if path not in later]


def _is_projector(path: Path) -> bool:
    # As llama.cpp tells them apart on the hub; whether it fits, its header says.
    return "mmproj" in path.name.lower()


def _fits(projector: Path, model: GgufModel) -> bool:
    """Nobody asked for what merely lies there, so another model's or a broken one is no error; pictures will miss it."""
    from qtool.scoring.llama_cpp.model import check_projector

    try:
        check_projector(projector, model)
    except ModelError:
        return False
    return True


def _only(folder: Path, files: list[Path], what: str, hint: str) -> Path:
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise UsageError(f"{folder} holds {len(files)} {what}, not one: {names}.", hint)
    return files[0]
