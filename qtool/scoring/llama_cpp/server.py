"""Starts llama.cpp's server inside this process, through the wheel `xllamacpp`.

Rule: every setting that could make a score depend on anything but model and prompt is pinned here.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

from qtool.checkpoint.workers import WORKERS
from qtool.errors import ModelError, SetupError
from qtool.inputs.limits import OFFICIAL_LIMITS

_SPLIT_BATCH: Final = 512  # llama.cpp's own default
_ERRORS_ONLY: Final = 1
_SIGACTION_BYTES: Final = 1024  # several times what any libc's struct takes


class Pooling(Enum):
    """What a context gives for a prompt: P(yes) of a reranker, or the hidden state of the last token."""

    RANK = "LLAMA_POOLING_TYPE_RANK"
    LAST = "LLAMA_POOLING_TYPE_LAST"


@dataclass(frozen=True)
class LlamaCppOptions:
    """How to run a GGUF file; the defaults verify it. A llama-server's own are an f16 cache and flash attention.

    `context`: pairs shorter than this are ranked as llama-server ranks; longer prompts are read in a context that grows.
    `threads`: 0 for one a processor.
    """

    kv_cache: Literal["f32", "f16"] = "f32"
    flash_attention: bool = False
    context: int = 4096
    threads: int = 0
    gpu_layers: int = 0


VERIFYING: Final = LlamaCppOptions()


def import_engine() -> Any:
    """The module xllamacpp. Raises SetupError."""
    try:
        import xllamacpp
    except ImportError as error:
        raise SetupError(
            f"Scoring GGUF files needs llama.cpp as the package xllamacpp: {error}.", "pip install 'qtool[llamacpp]'"
        ) from error
    return xllamacpp


def engine_version() -> str:
    """The wheel's version, which fixes llama.cpp's."""
    return version("xllamacpp")


def start_server(gguf: Path, mmproj: Path | None, pooling: Pooling, context: int, options: LlamaCppOptions) -> Any:
    """An `xllamacpp.Server` for prompts of less than `context` tokens; it stops when the last reference to it goes."""
    xllamacpp = import_engine()
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.mmproj.path = str(mmproj or "")
    _choose(params, xllamacpp, pooling, context, options)
    _make_repeatable(params)
    with _signals_kept():
        try:
            server = xllamacpp.Server(params)
        except RuntimeError:
            files = f"{gguf} with {mmproj}" if mmproj else str(gguf)
            raise ModelError(f"llama.cpp cannot load {files}.", "It has said why on standard error.") from None
    server.handle_metrics()  # answered by its loop, which must have begun before it is told to end: else that waits forever
    return server


def _choose(params: Any, xllamacpp: Any, pooling: Pooling, context: int, options: LlamaCppOptions) -> None:
    params.embedding = True
    params.pooling_type = getattr(xllamacpp.llama_pooling_type, pooling.value)
    params.n_ctx = context
    # A rank-pooled prompt must fit into one batch; any other is read in parts, which takes less memory.
    params.n_batch = params.n_ubatch = context if pooling is Pooling.RANK else min(context, _SPLIT_BATCH)
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.kv_cache.upper()}")
    attention = "ENABLED" if options.flash_attention else "DISABLED"
    params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{attention}")
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads or WORKERS
    params.n_gpu_layers = options.gpu_layers
    params.mmproj_use_gpu = options.gpu_layers != 0
    # llama.cpp's own limits are 8 and 4096; pictures arrive on the official grid, which it must leave alone.
    params.image_min_tokens = OFFICIAL_LIMITS.min_pixels // OFFICIAL_LIMITS.factor**2
    params.image_max_tokens = OFFICIAL_LIMITS.max_pixels // OFFICIAL_LIMITS.factor**2


def _make_repeatable(params: Any) -> None:
    """One prompt at a time, none remembered: a score must not depend on what was asked before or beside it."""
    params.n_parallel = 1
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.fit_params = False  # else the context shrinks to what memory is free
    params.warmup = False
    params.port = 0  # any free one, on the loopback interface
    params.n_threads_http = 1
    params.endpoint_metrics = True
    params.verbosity = _ERRORS_ONLY  # on standard error; nothing goes to standard output


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Undo what xllamacpp does to Ctrl-C: its handler calls into the newest server, even one that is gone.

    Through libc, since Python's `signal` neither sees handlers that C code installs nor works outside the main thread.
    """
    libc = ctypes.CDLL(None)
    kept = [(number, ctypes.create_string_buffer(_SIGACTION_BYTES)) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, action in kept:
        libc.sigaction(number, None, action)
    try:
        yield
    finally:
        for number, action in kept:
            libc.sigaction(number, action, None)
