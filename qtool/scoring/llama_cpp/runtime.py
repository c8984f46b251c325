"""The llama.cpp runtime: GGUF files behind the scorer protocol.

Rule: a text pair under the file's own instruction goes through the code of llama-server's /v1/rerank, which is what
users get. What that cannot take (pictures, other instructions) is read to its last hidden state, which meets the file's
head here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from qtool.artefact import require_fit
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.progress import ignore
from qtool.scoring.llama_cpp.model import LlamaCppModel, read_model
from qtool.scoring.llama_cpp.prompts import (
    TextPrompt,
    TextPromptBuilder,
    normalized,
    prompt_builder,
    ranked_text,
    request_of,
    side_text,
)
from qtool.scoring.llama_cpp.server import VERIFYING, Engines, LlamaCppOptions, Pooling, engine_version, import_engine
from qtool.scoring.scorer import (
    Answered,
    Identity,
    PromptSeen,
    distinct_pairs,
    files_sha256,
    log_odds,
    prompt_sha256,
    query_content,
)
from qtool.storage.gguf_model import GgufModel, open_gguf_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Self

    from qtool.arch.spec import Task

_DOCUMENTS_AT_ONCE: Final = 16
"""Bounds how long Ctrl-C waits: Python hears nothing while llama.cpp computes."""


def open_llama_cpp(gguf: Path, mmproj: Path | None = None, options: LlamaCppOptions = VERIFYING) -> LlamaCppScorer:
    """Open a GGUF file, and the projector that it needs for pictures. Raises ModelError, or SetupError without xllamacpp."""
    return llama_cpp_scorer(read_model(gguf), open_gguf_file(mmproj) if mmproj is not None else None, options)


def llama_cpp_scorer(
    model: LlamaCppModel, projector: GgufModel | None, options: LlamaCppOptions = VERIFYING
) -> LlamaCppScorer:
    """The scorer of a model whose headers have been read; the rest is as in `open_llama_cpp`."""
    import_engine()
    if projector is not None:
        require_fit(projector, model.file, model.family)
    return LlamaCppScorer(model, projector.path if projector is not None else None, options)


class LlamaCppScorer:
    """One GGUF file behind the scorer protocol; loaded at the first question."""

    def __init__(self, model: LlamaCppModel, mmproj: Path | None, options: LlamaCppOptions) -> None:
        self._model = model
        usual = Pooling.LAST if model.score_row is None else Pooling.RANK
        self._engines = Engines(model.path, mmproj, usual, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; another question would load it again."""
        self._engines.close()

    @property
    def task(self) -> Task:
        """See Scorer."""
        return self._model.task

    @property
    def family(self) -> str:
        """See Scorer."""
        return self._model.family.key

    @cached_property
    def identity(self) -> Identity:
        """See Scorer. Reads the files whole."""
        model, options = self._model, self._engines.options
        files = [*model.file.paths, *([self._engines.mmproj] if self._engines.mmproj else [])]
        return Identity(
            f"llama.cpp (xllamacpp {engine_version()})",
            files_sha256(files),
            prompt_sha256(model.prompt, model.rank_template),
            f"KV {options.kv_cache}, flash attention {'on' if options.flash_attention else 'off'}",
        )

    @property
    def query_instruction(self) -> str | None:
        """See Scorer."""
        return self._model.prompt.query_instruction or None

    @property
    def dimensions(self) -> int:
        """See Scorer."""
        return self._model.width

    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        """See Scorer. llama.cpp ranks in float32 probabilities: above 10, log-odds come with three digits; 17 is the end."""
        row = self._model.score_row
        if row is None:
            raise UsageError("An embedder does not score pairs.", "Choose --task embed.")
        scores: dict[int, float] = {}
        for batch, found in self._answers(pairs, row):
            for place, score in ((place, score) for same, score in zip(batch, found, strict=True) for place in same):
                scores[place] = score
                answered(place, score)
        return [scores[place] for place in range(len(pairs))]

    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NDArray[np.float32]:
        """See Scorer."""
        if self._model.score_row is not None:
            raise UsageError("A reranker does not embed items.", "Choose --task rerank.")
        vectors = []
        for place, item in enumerate(items):
            hidden = self._read(self._builder.item(item), [item])
            vectors.append((hidden / np.linalg.norm(hidden)).astype(np.float32))
            answered(place, vectors[-1])
        return np.stack(vectors)

    def prompt_seen(self, question: Pair | Item) -> PromptSeen:
        """See Scorer."""
        if isinstance(question, Pair) and (text := ranked_text(question, self._model)) is not None:
            return PromptSeen(tuple(self._engines.token_ids(text)))
        prompt = self._builder.pair(question) if isinstance(question, Pair) else self._builder.item(question)
        return PromptSeen(prompt.token_ids, tuple(picture.grid_thw for picture in prompt.pictures))

    def token_ids(self, text: str) -> list[int]:
        """llama.cpp's ids of a prompt, normalised as the official tokenizer does."""
        return self._engines.token_ids(normalized(text))

    @cached_property
    def _builder(self) -> TextPromptBuilder:
        return prompt_builder(self._model, self._engines.token_ids)

    def _answers(
        self, pairs: Sequence[Pair], row: NDArray[np.float64]
    ) -> Iterator[tuple[Sequence[Sequence[int]], Sequence[float]]]:
        """The places of equal pairs, with one score for each of them."""
        ranked: list[list[int]] = []
        judged: list[list[int]] = []
        for same in distinct_pairs(pairs):
            (ranked if self._is_ranked(pairs[same[0]]) else judged).append(same)
        for _, group in groupby(ranked, lambda same: query_content(pairs[same[0]].query)):
            places = list(group)
            for start in range(0, len(places), _DOCUMENTS_AT_ONCE):
                batch = places[start : start + _DOCUMENTS_AT_ONCE]
                yield batch, self._rank([pairs[same[0]] for same in batch])
        for same in judged:
            yield [same], [self._judge(pairs[same[0]], row)]

    def _is_ranked(self, pair: Pair) -> bool:
        text = ranked_text(pair, self._model)
        room = min(self._engines.options.context, self._model.prompt.truncation.max_length)
        # A token has at least one byte, so a short text need not be tokenized.
        return text is not None and (len(text.encode()) < room or len(self._engines.token_ids(text)) < room)

    def _rank(self, pairs: Sequence[Pair]) -> list[float]:
        query, *documents = (
            side_text(item, self._model.prompt) for item in (pairs[0].query, *(pair.document for pair in pairs))
        )
        answers = self._engines.engine(Pooling.RANK).rank(f"query {pairs[0].query.id!r}", query, documents)
        for pair, answer in zip(pairs, answers, strict=True):
            _check_finite(pair.name, answer)
        return [log_odds(answer) for answer in answers]

    def _judge(self, pair: Pair, row: NDArray[np.float64]) -> float:
        return float(self._read(self._builder.pair(pair), [pair.query, pair.document]) @ row)

    def _read(self, prompt: TextPrompt, items: Sequence[Item]) -> NDArray[np.float64]:
        """The hidden state of the last token."""
        if prompt.pictures and self._engines.mmproj is None:
            raise UsageError(
                f"{prompt.name} holds a picture, which needs the model's projector.", "Pass its mmproj file."
            )
        engine = self._engines.engine(Pooling.LAST, len(prompt.token_ids))
        hidden, count = engine.read(
            prompt.name, request_of(prompt, items, engine.media_marker if prompt.pictures else "")
        )
        if count != len(prompt.token_ids):
            raise ModelError(
                f"{prompt.name}: llama.cpp read {count:,} tokens, the official prompt has {len(prompt.token_ids):,}.",
                "A prompt with pictures must not exceed the model's length: llama.cpp cannot be given the shortened one.",
            )
        _check_finite(prompt.name, hidden)
        return hidden


def _check_finite(name: str, answer: float | NDArray[np.float64]) -> None:
    if not np.isfinite(answer).all():
        raise ModelError(
            f"{name}: the model's answer is not a finite number.",
            "The weights are broken, or llama.cpp cannot run them as they are stored; qtool inspect FILE says so.",
        )
