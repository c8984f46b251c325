"""What every runtime offers to the rooms above.

Rule: rerankers answer in log-odds before the sigmoid and embedders in unit vectors, so that runtimes compare directly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qtool.arch.spec import Task
    from qtool.inputs.items import Item, Pair

Answered = Callable[[int, Any], None]
"""Called with the place of a question and its answer (log-odds or a vector) once it is known; places come in any order."""


def unheard(_place: int, _answer: object) -> None:
    """Where nobody waits for single answers."""


@dataclass(frozen=True)
class Identity:
    """All that an answer depends on besides its question: equal identities give equal answers.

    `engine` names the runtime and its version, `model` and `prompt` are SHA-256 (of the files that decide scores; of
    prompt, truncation and pixel limits), `numbers` says in which precision was computed. Of a server `model` is its
    address and what it calls the model, and `is_pinned` is False: what lies behind an address may change.
    """

    engine: str
    model: str
    prompt: str
    numbers: str
    is_pinned: bool = True

    @property
    def key(self) -> str:
        """SHA-256 of it all."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PromptSeen:
    """What a model reads for one question: ids, and for each picture or pair of frames its patches (time, rows, columns)."""

    token_ids: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...] = ()


class Scorer(Protocol):
    """A model that is ready to score; weights are loaded at the first question, and all else is known before."""

    @property
    def task(self) -> Task:
        """Whether it scores pairs or embeds items."""

    @property
    def family(self) -> str | None:
        """The model's family as `arch` names it (`qwen3`, `qwen3_vl`); None where a server does not tell."""

    @property
    def identity(self) -> Identity:
        """What its answers depend on."""

    @property
    def query_instruction(self) -> str | None:
        """What the publisher gives to an embedder's queries where the panel says nothing."""

    @property
    def dimensions(self) -> int | None:
        """How many numbers an embedder's vectors have; None where only an answer tells."""

    def score(self, pairs: Sequence[Pair], answered: Answered = unheard) -> list[float]:
        """The log-odds log P(yes) - log P(no) of each pair, in the order given. Raises ModelError on a score that is not finite."""

    def embed(self, items: Sequence[Item], answered: Answered = unheard) -> NDArray[np.float32]:
        """L2-normalised vectors [n, dim], in the order given. Raises ModelError on a vector that is not finite."""

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """What the model reads for it; None where the runtime does not tell."""

    def close(self) -> None:
        """Free the model."""
