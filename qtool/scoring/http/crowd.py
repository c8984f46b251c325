"""Many questions to one server at a time.

Rule: answers are told by the thread that asked for them, as they come; after an error no new question is sent, but what
is under way is waited for and told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Event
from typing import TypeVar

from qtool.errors import QtoolError

QuestionT = TypeVar("QuestionT")
AnswerT = TypeVar("AnswerT")


def ask_all(
    batches: Sequence[Sequence[QuestionT]],
    ask: Callable[[Sequence[QuestionT]], Sequence[AnswerT | QtoolError]],
    tell: Callable[[QuestionT, AnswerT], None],
    workers: int,
    stop: Event,
) -> None:
    """Ask each batch and tell each answer; raises the first error that stands in place of one.

    `stop` is set as soon as no more is wanted, and stays so only if something may still be under way.
    """
    pool = ThreadPoolExecutor(workers)
    failed: QtoolError | None = None
    try:
        waiting = {pool.submit(_unless(stop, ask), batch): batch for batch in batches}
        for future in as_completed(waiting):
            for question, answer in zip(waiting[future], future.result(), strict=False):
                if isinstance(answer, QtoolError):
                    failed = failed or answer
                    stop.set()
                else:
                    tell(question, answer)
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
    stop.clear()  # all have answered, and what is asked next is asked patiently again
    if failed is not None:
        raise failed


def _unless(
    stop: Event, ask: Callable[[Sequence[QuestionT]], Sequence[AnswerT | QtoolError]]
) -> Callable[[Sequence[QuestionT]], Sequence[AnswerT | QtoolError]]:
    # Cancelling a future does not wake `as_completed`, so a batch that is not wanted any more has no answers instead.
    return lambda batch: [] if stop.is_set() else ask(batch)
