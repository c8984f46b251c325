"""A scorer that asks another one only what its stores of answers do not hold: resuming, caching and joining runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from typing_extensions import override

from qtool.inputs.items import Item, Pair
from qtool.progress import ignore
from qtool.scoring.ledger import Answer, AnswerStore
from qtool.scoring.question_keys import QuestionKeys
from qtool.scoring.scorer import Answered, Identity, PromptSeen, Scorer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.spec import Task

QuestionT = TypeVar("QuestionT", Pair, Item)


class Remembering(Scorer):
    """`scorer`, asked only what none of `stores` holds: each question is hashed once, equal ones are asked once.

    An answer is written to every store that lacks it before it is reported, in the order given, whether the model or
    another store gave it; so a killed run loses nothing that it had reported.
    """

    def __init__(self, scorer: Scorer, stores: Sequence[AnswerStore]) -> None:
        self._scorer = scorer
        self._stores = stores

    @property
    @override
    def task(self) -> Task:
        return self._scorer.task

    @property
    @override
    def family(self) -> str | None:
        return self._scorer.family

    @property
    @override
    def identity(self) -> Identity:
        return self._scorer.identity

    @property
    @override
    def query_instruction(self) -> str | None:
        return self._scorer.query_instruction

    @property
    @override
    def dimensions(self) -> int | None:
        return self._scorer.dimensions

    @override
    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        return [float(answer) for answer in self._answers(pairs, self._scorer.score, answered)]

    @override
    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NDArray[np.float32]:
        return np.stack(self._answers(items, self._scorer.embed, answered))

    @override
    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        return self._scorer.prompt_seen(question)

    @override
    def close(self) -> None:
        """Free the model and close the stores."""
        with ExitStack() as closing:
            for store in self._stores:
                closing.callback(store.close)
            closing.callback(self._scorer.close)

    def _answers(
        self, questions: Sequence[QuestionT], ask: Callable[[Sequence[QuestionT], Answered], Any], answered: Answered
    ) -> list[Any]:
        keys = QuestionKeys()
        places: dict[str, list[int]] = {}
        for index, question in enumerate(questions):
            places.setdefault(keys.key(question), []).append(index)
        answers: dict[int, Any] = {}

        def keep(key: str, answer: Answer) -> None:
            for store in self._stores:
                if key not in store:
                    store.write(key, questions[places[key][0]], answer)
            for index in places[key]:
                answers[index] = self._stores[0][key]  # as a later run will read it
                answered(index, answers[index])

        missing = []
        for key in places:
            known = next((store[key] for store in self._stores if key in store), None)
            if known is None:
                missing.append(key)
            else:
                keep(key, known)
        if missing:
            ask([questions[places[key][0]] for key in missing], lambda index, answer: keep(missing[index], answer))
        return [answers[index] for index in range(len(questions))]
