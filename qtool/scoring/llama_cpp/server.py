"""llama.cpp's server inside this process: how it is started, its requests, and its answers as numbers."""

from __future__ import annotations

import ctypes
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

import numpy as np

from qtool.errors import ModelError
from qtool.extras import import_failure, require_extra
from qtool.inputs.items import OFFICIAL_LIMITS
from qtool.workers import WORKERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Starting the server, through the wheel `xllamacpp`. Every setting that could make a score depend on anything but model
# and prompt is pinned here.

_SPLIT_BATCH: Final = 512  # llama.cpp's own default
_ERRORS_ONLY: Final = 1
_SIGACTION_BYTES: Final = 1024  # several times what any libc's struct takes


class Pooling(Enum):
    """What a context computes for a prompt: P(yes) of a reranker, or the hidden state of the last token."""

    RANK = "LLAMA_POOLING_TYPE_RANK"
    LAST = "LLAMA_POOLING_TYPE_LAST"


@dataclass(frozen=True)
class LlamaCppOptions:
    """How to run a GGUF file. The defaults verify it; llama-server's own are an f16 cache and flash attention.

    `context`: pairs shorter than this are ranked as llama-server ranks them; longer prompts get a larger context.
    `threads`: 0 for one per processor.
    """

    kv_cache: Literal["f32", "f16"] = "f32"
    flash_attention: bool = False
    context: int = 4096
    threads: int = 0
    gpu_layers: int = 0


VERIFYING: Final = LlamaCppOptions()


def import_llama_cpp() -> Any:
    """The module xllamacpp. Raises SetupError."""
    require_extra("llamacpp", "Scoring a GGUF file")
    try:
        import xllamacpp
    except ImportError as error:
        raise import_failure(error) from error
    return xllamacpp


def llama_cpp_version() -> str:
    """The wheel's version, which fixes llama.cpp's."""
    return version("xllamacpp")


def start_server(gguf: Path, mmproj: Path | None, pooling: Pooling, context: int, options: LlamaCppOptions) -> Any:
    """An `xllamacpp.Server` for prompts of less than `context` tokens; it stops with the last reference to it."""
    xllamacpp = import_llama_cpp()
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.mmproj.path = str(mmproj or "")
    _set_options(params, xllamacpp, pooling, context, options)
    _make_repeatable(params)
    with _signal_handlers_kept():
        try:
            server = xllamacpp.Server(params)
        except RuntimeError:
            files = f"{gguf} with {mmproj}" if mmproj else str(gguf)
            raise ModelError(f"llama.cpp cannot load {files}.", "Its own message is on standard error.") from None
    server.handle_metrics()  # waits until its loop runs; stopping a loop that has not begun would wait forever
    return server


def _set_options(params: Any, xllamacpp: Any, pooling: Pooling, context: int, options: LlamaCppOptions) -> None:
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
    # llama.cpp's own limits are 8 and 4096; pictures arrive on the official grid, which it must not change.
    params.image_min_tokens = OFFICIAL_LIMITS.min_pixels // OFFICIAL_LIMITS.factor**2
    params.image_max_tokens = OFFICIAL_LIMITS.max_pixels // OFFICIAL_LIMITS.factor**2


def _make_repeatable(params: Any) -> None:
    """One prompt at a time, none cached: a score must not depend on requests before or beside it."""
    params.n_parallel = 1
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.fit_params = False  # otherwise the context shrinks to fit into free memory
    params.warmup = False
    params.port = 0  # any free port, on the loopback interface
    params.n_threads_http = 1
    params.endpoint_metrics = True
    params.verbosity = _ERRORS_ONLY  # to standard error; nothing goes to standard output


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the handlers that xllamacpp replaces: its own calls into the newest server, even one that was freed.

    Through libc, since Python's `signal` neither sees handlers installed by C code nor works outside the main thread.
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


# Requests and answers, which are those of llama-server's HTTP interface.


class Context:
    """One file in one context of llama.cpp; prompts have less than `size` tokens."""

    def __init__(self, gguf: Path, mmproj: Path | None, pooling: Pooling, size: int, options: LlamaCppOptions) -> None:
        self.size = size
        self._server = start_server(gguf, mmproj, pooling, size, options)

    def rank(self, name: str, query: str, documents: Sequence[str]) -> list[float]:
        """P(yes) of each document as /v1/rerank returns it; NaN where the model computes none."""
        answer = _answer(name, self._server.handle_rerank, {"query": query, "documents": list(documents)})
        found = {result["index"]: result["relevance_score"] for result in answer["results"]}
        return [_number(found[index]) for index in range(len(documents))]

    def read(self, name: str, prompt: Any) -> tuple[NDArray[np.float64], int]:
        """The last token's hidden state [hidden], and the number of tokens read; `prompt` as /v1/embeddings takes it.

        Not for a rank-pooled context, whose output is one or two scores: llama.cpp reads beyond them and may crash.
        """
        answer = _answer(name, self._server.handle_embeddings, {"input": prompt, "embd_normalize": -1})
        vector = np.array([_number(value) for value in answer["data"][0]["embedding"]])
        return vector, int(answer["usage"]["prompt_tokens"])

    def token_ids(self, text: str) -> list[int]:
        """llama.cpp's ids of a text; special tokens are parsed, and those that the file asks for are added."""
        body = {"content": text, "add_special": True, "parse_special": True}
        ids: list[int] = self._request("POST", "/tokenize", body)["tokens"]
        return ids

    @cached_property
    def media_marker(self) -> str:
        """The placeholder of a picture in a prompt: drawn at random by the server, so that no text contains it."""
        return str(self._request("GET", "/props")["media_marker"])

    def close(self) -> None:
        """Free the model."""
        self._server = None

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        # The wheel has no call for these two endpoints, but its server listens on the loopback interface.
        address = urlsplit(self._server.listening_address)
        connection = HTTPConnection(address.hostname or "", address.port)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"Connection": "close"})
            return _checked("llama.cpp", json.loads(connection.getresponse().read()))
        finally:
            connection.close()


class Contexts:
    """The contexts of one file: loaded on first use, and loaded again with a larger context for a longer prompt."""

    def __init__(self, gguf: Path, mmproj: Path | None, default: Pooling, options: LlamaCppOptions) -> None:
        self.mmproj = mmproj
        self.options = options
        self._default = default
        self._gguf = gguf
        self._open: dict[Pooling, Context] = {}

    def context(self, pooling: Pooling, tokens: int = 0) -> Context:
        """The context for `pooling` that fits a prompt of `tokens`."""
        context = self._open.get(pooling)
        if context is not None and tokens < context.size:
            return context
        size = self.options.context
        while size <= tokens:
            size *= 2
        if context is not None:
            self._open.pop(pooling).close()
        projector = self.mmproj if pooling is Pooling.LAST else None
        self._open[pooling] = Context(self._gguf, projector, pooling, size, self.options)
        return self._open[pooling]

    def token_ids(self, text: str) -> list[int]:
        """As `Context.token_ids`, from whichever context is open."""
        context = next(iter(self._open.values()), None)
        return (context or self.context(self._default)).token_ids(text)

    def close(self) -> None:
        """Free the model; the next request loads it again."""
        while self._open:
            self._open.popitem()[1].close()


def _answer(name: str, handler: Any, body: Any) -> Any:
    try:
        answer = handler(body)
    except RuntimeError as error:
        raise ModelError(f"{name}: llama.cpp failed: {error}.") from error
    return _checked(name, answer)


def _checked(name: str, answer: Any) -> Any:
    if "error" in answer:
        raise ModelError(f"{name}: llama.cpp failed: {answer['error'].get('message')}.")
    return answer


def _number(value: float | None) -> float:
    return float("nan") if value is None else value  # JSON has no NaN
