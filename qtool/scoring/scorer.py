"""What every runtime offers: the scorer protocol, the identity of its answers, and their units."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

import numpy as np

from qtool.errors import UsageError
from qtool.inputs.items import OFFICIAL_LIMITS, ImageSource, Item, Pair, Video
from qtool.progress import ignore
from qtool.storage.hashing import sha256_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.prompts import PromptSpec
    from qtool.arch.spec import Task
    from qtool.progress import StageProgress

# The protocol. Rerankers answer in log-odds before the sigmoid and embedders in unit vectors, so that runtimes compare
# directly.


VectorsT = TypeVar("VectorsT", bound="NDArray[np.floating[Any]]")

Answered = Callable[[int, Any], None]
"""Called with the index of a question and its answer (log-odds or a vector) once it is known, in any order."""


class AnswerCounter:
    """An `Answered` that reports each answer to `progress` as one more of `total`, over any number of calls of a scorer."""

    def __init__(self, stage: str, total: int, progress: StageProgress) -> None:
        self._stage, self._total, self._progress = stage, total, progress
        self._done = 0
        progress(stage, 0, total)

    def __call__(self, _index: int, _answer: object) -> None:
        """Count one answer more."""
        self._done += 1
        self._progress(self._stage, self._done, self._total)


@dataclass(frozen=True)
class Identity:
    """All that an answer depends on besides its question: equal identities give equal answers.

    `engine` names the runtime and its version, `model` and `prompt` are SHA-256 (of the files that decide scores; of
    prompt, truncation and pixel limits), `numbers` is the precision that it computes in. For a server, `model` is its
    address and the name it gives the model, and `is_pinned` is False: the model behind an address may change.
    """

    engine: str
    model: str
    prompt: str
    numbers: str
    is_pinned: bool = True

    @property
    def key(self) -> str:
        """SHA-256 of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PromptSeen:
    """What a model reads for one question: token ids, and of each picture or pair of frames its patches (time, rows, columns)."""

    token_ids: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...] = ()


class Scorer(Protocol):
    """A model that is ready to score; weights are loaded at the first question, and all else is known before."""

    @property
    def task(self) -> Task:
        """Whether it scores pairs or embeds items."""

    @property
    def family(self) -> str | None:
        """The model's family as `arch` names it (`qwen3`, `qwen3_vl`); None where a server does not report it."""

    @property
    def identity(self) -> Identity:
        """What its answers depend on."""

    @property
    def query_instruction(self) -> str | None:
        """The publisher's instruction for an embedder's queries, used where the panel gives none."""

    @property
    def dimensions(self) -> int | None:
        """The width of an embedder's vectors; None where only an answer shows it."""

    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        """The log-odds log P(yes) - log P(no) of each pair, in the order given. Raises ModelError on a score that is not finite."""

    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NDArray[np.float32]:
        """L2-normalised vectors [n, dim], in the order given. Raises ModelError on a vector that is not finite."""

    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """What the model reads for `question`; None where the runtime does not report it."""

    def close(self) -> None:
        """Free the model."""


# Units: probabilities as engines give them, the log-odds that runtimes are compared in, and vectors of fewer dimensions.


_SMALLEST: Final = float(np.finfo(np.float32).smallest_subnormal)
_LARGEST: Final = 1 - 2.0**-25


def log_odds(probability: float) -> float:
    """Log p/(1-p), finite where a float32 has rounded to 0 or 1."""
    kept = min(max(probability, _SMALLEST), _LARGEST)
    return math.log(kept) - math.log1p(-kept)


LARGEST_LOG_ODDS: Final = 1e100
"""No model gives more; statistics of larger ones overflow."""


def sigmoid(score: float) -> float:
    """The probability of these log-odds, to the last digits however small."""
    small = math.exp(-abs(score))
    return (1.0 if score >= 0 else small) / (1.0 + small)


def shortened(vectors: VectorsT, dimensions: int) -> VectorsT:
    """The first `dimensions` of unit vectors [n, width], normalised again (MRL). Raises UsageError where they have fewer."""
    width = vectors.shape[1]
    if not 0 < dimensions <= width:
        raise UsageError(f"Vector has {width} dimensions; {dimensions} were requested.", f"Choose 1 to {width}.")
    cut = vectors[:, :dimensions]
    return cast("VectorsT", cut / np.linalg.norm(cut, axis=1, keepdims=True))


# Which pairs ask the same question. Only what the model sees counts, so ids, labels and an instruction on a document
# do not. A runtime groups the pairs that it is given by this; it needs no hash, and no file is read for it.


def query_content(query: Item) -> Hashable:
    """Equal for queries whose prompts begin alike."""
    return document_content(query), query.instruction


def document_content(item: Item) -> Hashable:
    """Equal for sides that look alike in a prompt; pictures in memory are compared by identity."""
    limits = item.limits if item.has_pictures else None
    return item.text, tuple(map(_image, item.image)), tuple(map(video_content, item.video)), limits


def video_content(video: Video) -> Hashable:
    """Equal for videos of the same frames."""
    frames = video.source if isinstance(video.source, str) else tuple(map(_image, video.source))
    return frames, video.fps, video.max_frames


def _image(source: ImageSource) -> Hashable:
    return source if isinstance(source, str) else id(source)


def distinct_pairs(pairs: Sequence[Pair]) -> list[list[int]]:
    """The indices of each distinct pair, a query's documents side by side, so that they are read together."""
    queries: dict[Hashable, dict[Hashable, list[int]]] = {}
    for index, pair in enumerate(pairs):
        documents = queries.setdefault(query_content(pair.query), {})
        documents.setdefault(document_content(pair.document), []).append(index)
    return [same for documents in queries.values() for same in documents.values()]


# Hashes of what a score depends on: a model's files and a prompt's rules. A file that cannot change a score is left out,
# so that a new README leaves cached scores valid.


_DECISIVE: Final = (
    "*.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_LogitScore/config.json",
)


def checkpoint_sha256(directory: Path) -> str:
    """SHA-256 of the weights, config, tokenizer and declared answer tokens in `directory`."""
    return files_sha256(sorted({path for pattern in _DECISIVE for path in directory.glob(pattern)}))


def files_sha256(paths: Sequence[Path]) -> str:
    """SHA-256 of these files' contents, in this order."""
    return _sha256(sha256_of(paths))


def prompt_sha256(prompt: PromptSpec, *more: str) -> str:
    """SHA-256 of a prompt's rules, the official pixel limits, and `more` that shapes what the model reads."""
    return _sha256([asdict(prompt), asdict(OFFICIAL_LIMITS), more])


def _sha256(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
