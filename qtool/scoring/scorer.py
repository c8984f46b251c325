"""What every runtime offers to the rooms above.

Rule: rerankers answer in log-odds before the sigmoid and embedders in unit vectors, so that runtimes compare directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qtool.inputs.items import Item, Pair

Progress = Callable[[int], None]
"""Called with the number of pairs or items finished since the last call."""


def no_progress(_finished: int) -> None:
    """Where nobody watches."""


class Scorer(Protocol):
    """A model that is ready to score."""

    @property
    def query_instruction(self) -> str | None:
        """What the publisher gives to an embedder's queries where the panel says nothing."""

    def score(self, pairs: Sequence[Pair], progress: Progress = no_progress) -> list[float]:
        """The log-odds log P(yes) - log P(no) of each pair, in the order given. Raises ModelError on a score that is not finite."""

    def embed(self, items: Sequence[Item], progress: Progress = no_progress) -> NDArray[np.float32]:
        """L2-normalised vectors [n, dim], in the order given. Raises ModelError on a vector that is not finite."""
