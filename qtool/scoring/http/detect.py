"""Which engine answers at an address, and for which task.

An engine is recognised by an endpoint that only it has, in this order: /props (llama-server), /info (TEI), /version
(vLLM). Any other server is assumed to have Jina's /rerank and OpenAI's /v1/embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError

if TYPE_CHECKING:
    from qtool.scoring.http.client import HttpClient


class ServerKind(Enum):
    """The engines that qtool supports; `JINA` is any server with the interfaces of Jina's and OpenAI's services."""

    LLAMA_SERVER = "llama-server"
    TEI = "tei"
    VLLM = "vllm"
    JINA = "jina"


@dataclass(frozen=True)
class Server:
    """What a server reports; `model` is empty where it names none, `media_marker` is llama-server's."""

    kind: ServerKind
    version: str
    model: str
    task: Task
    media_marker: str = ""

    @property
    def engine(self) -> str:
        """The engine's name and version."""
        return f"{self.kind.value} {self.version}".strip()


_LONGEST_NAME: Final = 1000
RERANK_PATHS: Final = ("/v1/rerank", "/rerank", "/v2/rerank")
"""The rerank endpoints of servers with Jina's interface."""

_ENDPOINTS: Final = (
    (ServerKind.LLAMA_SERVER, "/props", "default_generation_settings", "build_info"),
    (ServerKind.TEI, "/info", "model_id", "version"),
    (ServerKind.VLLM, "/version", "version", "version"),
)
"""Engine, endpoint, the field that identifies it, the field that holds its version."""


def detect_server(client: HttpClient, kind: ServerKind | None, model: str | None, task: Task | None) -> Server:
    """Detect the server; `kind`, `model` and `task` override what it reports. Raises NetworkError without one."""
    for engine, path, proof, version in _ENDPOINTS:
        found = client.get_json(path) if kind in (None, engine) else None
        page = found if isinstance(found, dict) else {}
        if kind is engine or proof in page:
            if task is Task.EMBED and proof in page:
                _refuse_reranker(client, engine, page)
            name = model or _text(page, "model_id") or _listed_model(client)
            reported, marker = _text(page, version), _text(page, "media_marker")
            return Server(engine, reported, name, task or _task(client, engine, page), marker)
    return Server(ServerKind.JINA, "", model or _listed_model(client), task or _task(client, ServerKind.JINA, {}))


def _text(page: Mapping[str, Any], name: str) -> str:
    """A name or version that a server reports: one that is no text, or a novel, is not one."""
    value = page.get(name, "")
    return value if isinstance(value, str) and len(value) <= _LONGEST_NAME else ""


def _refuse_reranker(client: HttpClient, kind: ServerKind, page: Mapping[str, Any]) -> None:
    """Raise UsageError where an engine that either ranks or embeds reports that it ranks: it has no usable vectors."""
    if kind in (ServerKind.LLAMA_SERVER, ServerKind.TEI) and _task(client, kind, page) is Task.RERANK:
        raise UsageError(
            f"{client.url} serves a reranker (as {kind.value} reports), but the task is embed.",
            "Pass the address of an embedder; if the server is the right one, pass a reranker as the reference.",
        )


def _task(client: HttpClient, kind: ServerKind, page: Mapping[str, Any]) -> Task:
    """As TEI reports it; the others have a rerank endpoint that embedders lack.

    Of vLLM that is /classify, since its /score compares vectors too. Raises ModelError where there is no known
    endpoint.
    """
    if "model_type" in page:
        declared = page["model_type"]  # TEI: {"reranker": …} or {"embedding": …}
        return Task.RERANK if isinstance(declared, dict | str) and "reranker" in declared else Task.EMBED
    endpoints = {ServerKind.VLLM: ("/classify",), ServerKind.LLAMA_SERVER: ("/v1/rerank",)}
    if any(client.has_endpoint(path) for path in endpoints.get(kind, RERANK_PATHS)):
        return Task.RERANK
    if not page and client.get_json("/v1/models") is None and not client.has_endpoint("/v1/embeddings"):
        raise ModelError(f"{client.url} has no endpoint of a scoring server.", "Check the address.")
    return Task.EMBED


def _listed_model(client: HttpClient) -> str:
    page = client.get_json("/v1/models")
    entries = page.get("data") if isinstance(page, dict) else None
    listed = entries if isinstance(entries, list) else []
    names = [_text(entry, "id") for entry in listed if isinstance(entry, dict) and "id" in entry]
    if len(names) > 1:
        raise UsageError(f"{client.url} serves several models: {', '.join(names)}.", "Choose one by its name.")
    return names[0] if names else ""
