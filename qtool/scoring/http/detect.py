"""Which engine answers at an address, and for which task.

Rule: an engine is known by a page that only it has, asked for in this order: /props (llama-server), /info (TEI), /version
(vLLM). What has none of them is taken for a server of Jina's /rerank and OpenAI's /v1/embeddings.
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
    """The engines that qtool can ask; `JINA` stands for all that speak like Jina's and OpenAI's services."""

    LLAMA_SERVER = "llama-server"
    TEI = "tei"
    VLLM = "vllm"
    JINA = "jina"


@dataclass(frozen=True)
class Server:
    """What a server says of itself; `model` is empty where it names none, `media_marker` llama-server's."""

    kind: ServerKind
    version: str
    model: str
    task: Task
    media_marker: str = ""

    @property
    def engine(self) -> str:
        """Its name and version."""
        return f"{self.kind.value} {self.version}".strip()


RERANK_PATHS: Final = ("/v1/rerank", "/rerank", "/v2/rerank")
"""Where servers of Jina's shape rank."""

_PAGES: Final = (
    (ServerKind.LLAMA_SERVER, "/props", "default_generation_settings", "build_info"),
    (ServerKind.TEI, "/info", "model_id", "version"),
    (ServerKind.VLLM, "/version", "version", "version"),
)
"""An engine, a page of it, the field that proves it, and the one that holds its version."""


def detect_server(client: HttpClient, kind: ServerKind | None, model: str | None, task: Task | None) -> Server:
    """Ask who is there; `kind`, `model` and `task` override the answers. Raises NetworkError where nobody is."""
    for engine, path, proof, version in _PAGES:
        found = client.find(path) if kind in (None, engine) else None
        page = found if isinstance(found, dict) else {}
        if kind is engine or proof in page:
            if task is Task.EMBED and proof in page:
                _refuse_reranker(client, engine, page)
            name = model or page.get("model_id") or _listed_model(client)
            marker, said = str(page.get("media_marker", "")), task or _task(client, engine, page)
            return Server(engine, str(page.get(version, "")), str(name), said, marker)
    return Server(ServerKind.JINA, "", model or _listed_model(client), task or _task(client, ServerKind.JINA, {}))


def _refuse_reranker(client: HttpClient, kind: ServerKind, page: Mapping[str, Any]) -> None:
    """Raise UsageError where an engine that either ranks or embeds says that it ranks: its vectors would be none."""
    if kind in (ServerKind.LLAMA_SERVER, ServerKind.TEI) and _task(client, kind, page) is Task.RERANK:
        raise UsageError(
            f"{client.url} is a reranker ({kind.value} says so), and vectors are asked of it.",
            "Name a server of an embedder or, where the server is right, a reranker as the reference.",
        )


def _task(client: HttpClient, kind: ServerKind, page: Mapping[str, Any]) -> Task:
    """TEI says it; the others rank at pages that embedders lack (vLLM's /score compares vectors too, /classify does not).

    Raises ModelError where there is no page at all.
    """
    if "model_type" in page:
        return Task.RERANK if "reranker" in page["model_type"] else Task.EMBED
    pages = {ServerKind.VLLM: ("/classify",), ServerKind.LLAMA_SERVER: ("/v1/rerank",)}
    if any(client.takes(path) for path in pages.get(kind, RERANK_PATHS)):
        return Task.RERANK
    if not page and client.find("/v1/models") is None and not client.takes("/v1/embeddings"):
        raise ModelError(f"{client.url} has no page of a scoring server.", "Is this the server's address?")
    return Task.EMBED


def _listed_model(client: HttpClient) -> str:
    listed = client.find("/v1/models")
    entries = listed.get("data") if isinstance(listed, dict) else None
    names = [str(entry["id"]) for entry in entries or [] if isinstance(entry, dict) and "id" in entry]
    if len(names) > 1:
        raise UsageError(f"{client.url} serves several models: {', '.join(names)}.", "Say which one is meant.")
    return names[0] if names else ""
