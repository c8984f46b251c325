"""A scorer that asks another one only what its stores of answers do not hold: resuming, caching and joining runs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import numpy as np
from PIL.Image import Image
from typing_extensions import override

import qtool
from qtool.errors import QtoolError, SetupError, UsageError, reason
from qtool.inputs.items import Item, Pair
from qtool.inputs.pictures import to_rgb
from qtool.progress import ignore
from qtool.scoring.ledger import (
    Answer,
    AnswerStore,
    Ledger,
    answer_line,
    check_answer,
    numbered_answer,
    open_ledger,
    read_answer,
    read_header,
    read_identity,
    stacked,
)
from qtool.scoring.scorer import Answered, Identity, PromptSeen, Scorer
from qtool.storage.output import named_write_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.spec import Task

# The key of a question: a hash of all that a scorer is shown of it. Ids, labels and origins do not count, files count by
# their bytes and pictures in memory by their pixels. What lies behind an http(s) address is not fetched: the address
# counts instead, and such a key is not kept from one run to the next (`names_content`).


_NOT_SHOWN: Final = ("id", "label", "origin")
_BLOCK: Final = 1 << 20
_ELSEWHERE: Final = ("http://", "https://")
_ADDRESSES: Final = ("data:", *_ELSEWHERE)


def names_content(question: Pair | Item) -> bool:
    """Whether the question's key stands for its content for ever: no picture or video lies behind an http(s) address."""
    items = (question.query, question.document) if isinstance(question, Pair) else (question,)
    sources = [source for item in items for source in (*item.image, *(video.source for video in item.video))]
    flat = [part for source in sources for part in (source if isinstance(source, tuple) else (source,))]
    return not any(isinstance(source, str) and source.startswith(_ELSEWHERE) for source in flat)


class QuestionKeys:
    """Keys of questions that are asked together; a file or picture that recurs is read once."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._pictures: dict[int, tuple[Image, str]] = {}

    def key(self, question: Pair | Item) -> str:
        """SHA-256 of the question. Raises UsageError where a file cannot be read."""
        if isinstance(question, Pair):
            # A prompt shows the query's instruction, never the document's.
            document = question.document.with_instruction(None)
            return _sha256(["pair", self._item(question.query), self._item(document)])
        return _sha256(["item", self._item(question)])

    def _item(self, item: Item) -> dict[str, Any]:
        shown = {field.name: getattr(item, field.name) for field in fields(item) if field.name not in _NOT_SHOWN}
        try:
            return {
                name: value if name in ("text", "instruction") else self._media(value) for name, value in shown.items()
            }
        except OSError as error:
            raise UsageError(f"{item.name}: cannot read {error.filename}: {reason(error)}.") from error

    def _media(self, value: Any) -> Any:
        if isinstance(value, str):
            return value if value.startswith(_ADDRESSES) else self._file(value)
        if isinstance(value, Image):
            return self._picture(value)
        if isinstance(value, tuple | list):
            return [self._media(each) for each in value]
        if is_dataclass(value):
            return {field.name: self._media(getattr(value, field.name)) for field in fields(value)}
        return value

    def _file(self, path: str) -> str:
        if path not in self._files:
            digest = hashlib.sha256()
            with Path(path).open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            self._files[path] = digest.hexdigest()
        return self._files[path]

    def _picture(self, picture: Image) -> str:
        if id(picture) not in self._pictures:
            seen = to_rgb(picture)
            digest = hashlib.sha256(f"{seen.size} ".encode() + seen.tobytes()).hexdigest()
            self._pictures[id(picture)] = picture, digest  # the picture is kept, so that no other gets its id
        return self._pictures[id(picture)][1]


def _sha256(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
        return stacked(self._answers(items, self._scorer.embed, answered))

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
                check_answer(questions[places[key][0]], known)
                keep(key, known)
        if missing:
            ask([questions[places[key][0]] for key in missing], lambda index, answer: keep(missing[index], answer))
        return [answers[index] for index in range(len(questions))]


# The cache: answers kept from one run to the next, in the user's folder. Only of a pinned identity and to questions whose
# content is pinned too: a server's answers, or what lies at an address, may be others tomorrow. A cache that cannot be
# read or written ends no run: it is logged once, and the models are asked.


_BROKEN: Final = ".broken"

log = logging.getLogger("qtool.scoring")


def cache_folder() -> Path:
    """`$QTOOL_CACHE`, or `qtool` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("QTOOL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtool"


def cached_answers(identity: Identity) -> Path:
    """The ledger of `identity` in the cache, of this version of qtool: another may read the same picture differently."""
    return cache_folder() / "answers" / qtool.__version__ / f"{identity.key}.jsonl"


def open_cache(identity: Identity) -> AnswerStore | None:
    """The cached answers of `identity`; None where it is not pinned or the cache cannot be written."""
    if not identity.is_pinned:
        return None
    try:
        return _Cache(_open_cache_ledger(identity))
    except (QtoolError, OSError) as error:
        log.warning("Answers are not cached: %s", error)
        return None


def _open_cache_ledger(identity: Identity) -> Ledger:
    path = cached_answers(identity)
    try:
        return open_ledger(path, identity, is_shared=True)
    except UsageError as error:
        log.warning(
            "%s The cache of these answers starts over; the old file is renamed to *%s.", error.message, _BROKEN
        )
    with suppress(FileNotFoundError):  # another run has renamed it
        path.replace(path.with_name(path.name + _BROKEN))
    return open_ledger(path, identity, is_shared=True)


class _Cache(AnswerStore):
    """A ledger that keeps in memory what must not be kept longer, and everything once the disk refuses a line."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._in_memory: dict[str, Answer] = {}
        self._is_full = False

    @override
    def __contains__(self, key: str) -> bool:
        return key in self._in_memory or key in self._ledger

    @override
    def __getitem__(self, key: str) -> Answer:
        return self._in_memory[key] if key in self._in_memory else self._ledger[key]

    @override
    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        if names_content(question) and not self._is_full:
            try:
                self._ledger.write(key, question, answer)
            except SetupError as error:
                log.warning("%s From here on, answers are not cached.", error.message)
                self._is_full = True
            else:
                return
        self._in_memory[key] = read_answer(answer_line(key, question, answer))[1]  # as the ledger would return it

    @override
    def close(self) -> None:
        with suppress(SetupError):
            self._ledger.close()


# Several ledgers of one identity joined, for a scorer without a model. The files are only read, since they may lie where
# nothing can be written; a question that none of them answers is an error that names it.


_CLOSED: Final = -1
_AGAIN: Final = "Verify that shard again."


class UnansweredError(UsageError):
    """No ledger holds the answers to `count` questions, the first of which is called `name`."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"No run has answered {name}{f', nor {count - 1} more' if count > 1 else ''}.")


def read_ledgers(parts: Sequence[Path], task: Task) -> Remembering:
    """All answers of `parts`, which must be of one identity. Raises UsageError on a part of another, or a broken one."""
    identity = _identity(parts[0])
    known = dict(answer for part in parts for answer in _read_answers(part, identity))
    return Remembering(_NoModel(identity, task), [Ledger(parts[0], _CLOSED, known, is_shared=False)])


def copy_ledgers(parts: Sequence[Path], target: Path) -> None:
    """Write the answers of `parts`, which `read_ledgers` took, as one ledger. Raises SetupError."""
    with named_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as joined:
            for number, part in enumerate(parts):
                joined.writelines(islice(_whole_lines(part), 1 if number else 0, None))  # one header is enough


def _read_answers(part: Path, identity: Identity) -> Iterator[tuple[str, Answer]]:
    lines = _whole_lines(part)
    try:
        read_header(next(lines, b""), identity, part)
    except UsageError as error:  # its hint is for a run that writes the ledger
        raise UsageError(error.message, _AGAIN) from error
    yield from (numbered_answer(part, number, line, _AGAIN) for number, line in enumerate(lines, start=2))


def _identity(path: Path) -> Identity:
    identity = read_identity(next(_whole_lines(path), b""))
    if identity is None:
        raise UsageError(f"{path} is not a ledger of answers.", _AGAIN)
    return identity


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a ledger without what a killed run cut off at the end."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {reason(error)}.") from error


class _NoModel(Scorer):
    """A scorer that has no answer to anything."""

    family = None
    query_instruction = None
    dimensions = None

    def __init__(self, identity: Identity, task: Task) -> None:
        self._identity = identity
        self._task = task

    @property
    @override
    def task(self) -> Task:
        return self._task

    @property
    @override
    def identity(self) -> Identity:
        return self._identity

    @override
    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> NoReturn:
        raise UnansweredError(pairs[0].name, len(pairs))

    @override
    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NoReturn:
        raise UnansweredError(f"item {items[0].id!r}", len(items))

    @override
    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        return None

    @override
    def close(self) -> None:
        pass
