"""A scorer that asks another one only what its ledger or the cache does not know."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

import numpy as np
from PIL.Image import Image

import qtool
from qtool.errors import QtoolError, SetupError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.inputs.pictures import to_rgb
from qtool.progress import ignore
from qtool.scoring.ledger import Answer, Ledger, answer_line, open_ledger, read_answer, read_header
from qtool.scoring.scorer import Answered, Identity, PromptSeen, Scorer
from qtool.storage.output import named_write_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.spec import Task

# What a question is known by: a hash of all that a scorer is shown of it. Ids, labels and origins do not count, files
# count by their bytes and pictures in memory by their pixels. What lies behind an http(s) address is not fetched for
# this: there the address counts, and only as long as `names_content` need not hold.


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
            raise UsageError(f"{item.name}: cannot read {error.filename}: {error.strerror}.") from error

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
            self._pictures[id(picture)] = picture, digest  # kept, so that its id stays its own
        return self._pictures[id(picture)][1]


def _sha256(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# A scorer that asks another one only what its ledger does not know. Resuming and caching are this one thing; where
# the ledger lies makes the difference.


QuestionT = TypeVar("QuestionT", Pair, Item)


class AnswerStore(Protocol):
    """What a Ledger does here: answers by the key of their question."""

    def __contains__(self, key: str) -> bool: ...

    def __getitem__(self, key: str) -> Answer: ...

    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        """Remember an answer."""

    def close(self) -> None:
        """Let go of the file."""


class Remembering:
    """`scorer` behind the same protocol, with the answers in `ledger`; equal questions are asked once."""

    def __init__(self, scorer: Scorer, ledger: AnswerStore) -> None:
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

    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        """See Scorer. Known answers are told first."""
        return [float(answer) for answer in self._ask(pairs, self._scorer.score, answered)]

    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NDArray[np.float32]:
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


# Answers kept from one run to the next, in the user's cache. Only those of a pinned identity, to questions whose
# content is pinned too: what a server answers today, or shows at an address, it may not tomorrow. And no run ends for
# the cache's sake: what cannot be read or written is said once, and the models are asked.


_BROKEN: Final = ".broken"

log = logging.getLogger("qtool.scoring")


def cache_folder() -> Path:
    """`$QTOOL_CACHE`, or `qtool` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("QTOOL_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtool"


def cached_answers(identity: Identity) -> Path:
    """The ledger of `identity` in the cache; another version of qtool, which may read a picture otherwise, has another."""
    return cache_folder() / "answers" / qtool.__version__ / f"{identity.key}.jsonl"


def cached(scorer: Scorer) -> Scorer:
    """`scorer` with its answers in the cache; itself where it is not pinned or the cache cannot be written."""
    if not scorer.identity.is_pinned:
        return scorer
    try:
        return Remembering(scorer, _CacheLedger(_opened(scorer.identity)))
    except (QtoolError, OSError) as error:
        log.warning("Answers are not cached: %s", error)
        return scorer


def _opened(identity: Identity) -> Ledger:
    path = cached_answers(identity)
    try:
        return open_ledger(path, identity, is_shared=True)
    except UsageError as error:
        log.warning("%s The cache of these answers begins anew; the file is now called *%s.", error.message, _BROKEN)
    with suppress(FileNotFoundError):  # another run has set it aside
        path.replace(path.with_name(path.name + _BROKEN))
    return open_ledger(path, identity, is_shared=True)


class _CacheLedger:
    """A ledger that goes on in memory where the disk takes no more, and for what is not to be kept."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._unkept: dict[str, Answer] = {}
        self._is_full = False

    def __contains__(self, key: str) -> bool:
        return key in self._unkept or key in self._ledger

    def __getitem__(self, key: str) -> Answer:
        return self._unkept[key] if key in self._unkept else self._ledger[key]

    def write(self, key: str, question: Pair | Item, answer: Answer) -> None:
        """Remember an answer, on the disk if it may be kept and until that fails once."""
        if not (names_content(question) and self._is_kept(key, question, answer)):
            self._unkept[key] = read_answer(answer_line(key, question, answer))[1]  # as the ledger would give it back

    def _is_kept(self, key: str, question: Pair | Item, answer: Answer) -> bool:
        if self._is_full:
            return False
        try:
            self._ledger.write(key, question, answer)
        except SetupError as error:
            log.warning("%s From here on, answers are not cached.", error.message)
            self._is_full = True
        return not self._is_full

    def close(self) -> None:
        """Let go of the file."""
        with suppress(SetupError):
            self._ledger.close()


# Several ledgers of one scorer as one, and a scorer that knows only what stands in them. Nothing is asked, and
# nothing is written into the parts, which may lie where nobody may write; an answer that no ledger holds is an error
# that names the question.


_NO_FILE = -1


class UnansweredError(UsageError):
    """No ledger holds the answers to `count` questions, the first of which is called `name`."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(f"No run has answered {name}{f', nor {count - 1} more' if count > 1 else ''}.")


def read_ledgers(parts: Sequence[Path], task: Task) -> Remembering:
    """All answers of `parts`, which must be of one identity. Raises UsageError on one that is another's or broken."""
    identity = _identity(parts[0])
    known = dict(answer for part in parts for answer in _answers(part, identity))
    return Remembering(_Silent(identity, task), Ledger(parts[0], _NO_FILE, known, is_shared=False))


def copy_ledgers(parts: Sequence[Path], target: Path) -> None:
    """Write the answers of `parts`, which `read_ledgers` took, as one ledger. Raises SetupError."""
    with named_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as joined:
            for number, part in enumerate(parts):
                joined.writelines(islice(_whole_lines(part), 1 if number else 0, None))  # one header is enough


def _answers(part: Path, identity: Identity) -> Iterator[tuple[str, Answer]]:
    lines = _whole_lines(part)
    try:
        read_header(next(lines, b""), identity, part)
    except UsageError as error:  # whose hint is for who writes a ledger
        raise UsageError(error.message, "Verify that shard again.") from error
    yield from (_answer(part, number, line) for number, line in enumerate(lines, start=2))


def _answer(part: Path, number: int, line: bytes) -> tuple[str, Answer]:
    try:
        return read_answer(line)
    except ValueError as error:
        raise UsageError(f"{part}, line {number} is no answer: {error}.", "Verify that shard again.") from error


def _identity(path: Path) -> Identity:
    try:
        return Identity(**json.loads(next(_whole_lines(path), b""))["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no ledger of answers.") from error


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a ledger without what a killed run tore off at the end."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except OSError as error:
        raise SetupError(f"{path} cannot be read: {error.strerror}.") from error


class _Silent:
    """A scorer without a model."""

    family = None
    query_instruction = None
    dimensions = None

    def __init__(self, identity: Identity, task: Task) -> None:
        self.identity = identity
        self.task = task

    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> NoReturn:
        del answered
        raise UnansweredError(pairs[0].name, len(pairs))

    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NoReturn:
        del answered
        raise UnansweredError(f"item {items[0].id!r}", len(items))

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        del question
        return None

    def close(self) -> None:
        """There is nothing to free."""
