"""A scorer that asks another one only what its ledger does not know.

Rule: resuming and caching are this one thing; where the ledger lies makes the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from qtool.answers.keys import QuestionKeys
from qtool.inputs.items import Item, Pair
from qtool.scoring.scorer import Answered, Identity, PromptSeen, Scorer, unheard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.answers.lines import Answer
    from qtool.arch.spec import Task

QuestionT = TypeVar("QuestionT", Pair, Item)


class Memory(Protocol):
    """What a Ledger does here: answers by the key of their question."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> Answer: ...

    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        """Remember an answer."""

    def close(self) -> None:
        """Let go of the file."""


class Remembering:
    """`scorer` behind the same protocol, with the answers in `ledger`; equal questions are asked once."""

    def __init__(self, scorer: Scorer, ledger: Memory) -> None:
        self._scorer = scorer
        self._ledger = ledger

    @property
    def task(self) -> Task:
        """See Scorer."""
        return self._scorer.task

    @property
    def family(self) -> str | None:
        """See Scorer."""
        return self._scorer.family

    @property
    def identity(self) -> Identity:
        """See Scorer."""
        return self._scorer.identity

    @property
    def query_instruction(self) -> str | None:
        """See Scorer."""
        return self._scorer.query_instruction

    @property
    def dimensions(self) -> int | None:
        """See Scorer."""
        return self._scorer.dimensions

    def score(self, pairs: Sequence[Pair], answered: Answered = unheard) -> list[float]:
        """See Scorer. Known answers are told first."""
        return [float(answer) for answer in self._ask(pairs, self._scorer.score, answered)]

    def embed(self, items: Sequence[Item], answered: Answered = unheard) -> NDArray[np.float32]:
        """See Scorer. Known answers are told first."""
        return np.stack(self._ask(items, self._scorer.embed, answered))

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """See Scorer."""
        return self._scorer.prompt_seen(question)

    def close(self) -> None:
        """Free the model and let go of the ledger."""
        try:
            self._scorer.close()
        finally:
            self._ledger.close()

    def _ask(
        self, questions: Sequence[QuestionT], ask: Callable[[Sequence[QuestionT], Answered], Any], answered: Answered
    ) -> list[Any]:
        keys = QuestionKeys()
        places: dict[str, list[int]] = {}
        for place, question in enumerate(questions):
            places.setdefault(keys.key(question), []).append(place)
        missing = [key for key in places if key not in self._ledger]
        answers: dict[int, Any] = {}

        def tell(key: str) -> None:
            for place in places[key]:
                answers[place] = self._ledger[key]
                answered(place, answers[place])

        def heard(index: int, answer: Any) -> None:
            key = missing[index]
            self._ledger.write(key, questions[places[key][0]], answer)
            tell(key)

        for key in places:
            if key in self._ledger:
                tell(key)
        if missing:
            ask([questions[places[key][0]] for key in missing], heard)
        return [answers[place] for place in range(len(questions))]
