"""What each engine behind an address can be asked, whatever its dialect.

Rule: what an engine cannot take is refused before anything is sent, with the reason and the item.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Protocol

from qtool.errors import UsageError
from qtool.inputs.items import ImageSource, Item, Pair
from qtool.scoring.pictures import png_base64

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qtool.arch.prompts import PromptSpec
    from qtool.arch.spec import Task
    from qtool.scoring.scorer import PromptSeen

DOCUMENTS_AT_ONCE: Final = 8
"""Few enough that answers come soon, and that not much is lost with a server that dies."""


class HttpEngine(Protocol):
    """One engine's dialect; its methods are called from several threads."""

    def texts_only(self, task: Task) -> str:
        """Why it takes no pictures for a task, as a sentence; empty where it takes them."""

    def check_pair(self, pair: Pair) -> None:
        """Raise UsageError where it cannot be asked."""

    def check_item(self, item: Item) -> None:
        """Raise UsageError where it cannot be asked."""

    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Find out, before pairs are ranked, how the server answers. Raises QtoolError."""

    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        """The log-odds of pairs of one query; not a number where the server computes none."""

    def embed(self, item: Item) -> NDArray[np.float64]:
        """Its vector, of length 1."""

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """See Scorer."""


def request_name(pairs: Sequence[Pair]) -> str:
    """How messages name a request for several documents of one query."""
    return pairs[0].name if len(pairs) == 1 else f"{pairs[0].name} and {len(pairs) - 1} more"


def item_name(item: Item) -> str:
    """How messages name an item."""
    return f"item {item.id!r}"


def picture_url(item: Item, source: ImageSource) -> str:
    """A picture of `item`, resized by the official rule, as a `data:` URL. Raises an error that names the item."""
    return f"data:image/png;base64,{png_base64(item, source)}"


def check_no_video(item: Item) -> None:
    """Raise UsageError for a video."""
    if item.video:
        raise UsageError(
            f"{item.name} holds a video, which is not sent to servers: each picks frames by a rule of its own.",
            "Give its frames as pictures, or verify the artefact's files.",
        )


def check_text_only(item: Item, why: str) -> None:
    """Raise UsageError for a picture or a video."""
    check_no_video(item)
    if item.image:
        raise UsageError(f"{item.name} holds a picture: {why}", "Choose a panel of texts for this server.")


def check_empty_is_missing(pair: Pair, template: str) -> None:
    """Raise UsageError for an empty text, where `template` would write the word for a side without content."""
    for side in (pair.query, pair.document):
        if side.text and not side.joined_text and not side.image:
            raise UsageError(
                f"{pair.name}: item {side.id!r} is an empty text, which {template} cannot tell from a missing one."
            )


def known_prompt(prompt: PromptSpec | None, why: str) -> PromptSpec:
    """The prompt, or a UsageError that asks for it."""
    if prompt is None:
        raise UsageError(
            f"{why}, and a server does not say which model it runs.", "Name the reference, whose prompt it is."
        )
    return prompt
