"""The llama.cpp runtime: a GGUF file as a Scorer.

A text pair with the file's own instruction is scored by the code of llama-server's /v1/rerank, as its users get it. For
what that cannot take (pictures, other instructions) the head is applied here to the last hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from typing_extensions import Self, override

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
from qtool.scoring.llama_cpp.server import (
    VERIFYING,
    Contexts,
    LlamaCppOptions,
    Pooling,
    import_llama_cpp,
    llama_cpp_version,
)
from qtool.scoring.scorer import (
    Answered,
    Identity,
    PromptSeen,
    Scorer,
    distinct_pairs,
    files_sha256,
    log_odds,
    prompt_sha256,
    query_content,
)
from qtool.storage.gguf_model import GgufModel, open_gguf_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.arch.spec import Task

_DOCUMENTS_AT_ONCE: Final = 16
"""Bounds how long Ctrl-C waits: Python handles no signal while llama.cpp computes."""


def open_llama_cpp(gguf: Path, mmproj: Path | None = None, options: LlamaCppOptions = VERIFYING) -> LlamaCppScorer:
    """Open a GGUF file, and the projector that pictures need. Raises ModelError, or SetupError without xllamacpp."""
    return llama_cpp_scorer(read_model(gguf), open_gguf_file(mmproj) if mmproj is not None else None, options)


def llama_cpp_scorer(
    model: LlamaCppModel, projector: GgufModel | None, options: LlamaCppOptions = VERIFYING
) -> LlamaCppScorer:
    """As `open_llama_cpp`, for a model whose headers have been read."""
    import_llama_cpp()
    if projector is not None:
        require_fit(projector, model.file, model.family)
    return LlamaCppScorer(model, projector.path if projector is not None else None, options)


class LlamaCppScorer(Scorer):
    """One GGUF file, loaded at the first question."""

    def __init__(self, model: LlamaCppModel, mmproj: Path | None, options: LlamaCppOptions) -> None:
        self._model = model
        default = Pooling.LAST if model.score_row is None else Pooling.RANK
        self._contexts = Contexts(model.path, mmproj, default, options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @override
    def close(self) -> None:
        """Free the model; the next question loads it again."""
        self._contexts.close()

    @property
    @override
    def task(self) -> Task:
        return self._model.task

    @property
    @override
    def family(self) -> str:
        return self._model.family.key

    @cached_property
    @override
    def identity(self) -> Identity:
        """Hashing it reads the files whole."""
        model, options = self._model, self._contexts.options
        files = [*model.file.paths, *([self._contexts.mmproj] if self._contexts.mmproj else [])]
        return Identity(
            f"llama.cpp (xllamacpp {llama_cpp_version()})",
            files_sha256(files),
            prompt_sha256(model.prompt, model.rank_template),
            f"KV {options.kv_cache}, flash attention {'on' if options.flash_attention else 'off'}",
        )

    @property
    @override
    def query_instruction(self) -> str | None:
        return self._model.prompt.query_instruction or None

    @property
    @override
    def dimensions(self) -> int:
        return self._model.width

    @override
    def score(self, pairs: Sequence[Pair], answered: Answered = ignore) -> list[float]:
        """llama.cpp ranks in float32 probabilities: log-odds above 10 have three digits, and none exceeds 17."""
        row = self._model.score_row
        if row is None:
            raise UsageError("The model is an embedder and cannot score pairs.", "Pass --task embed.")
        scores: dict[int, float] = {}
        for batch, found in self._scores(pairs, row):
            for index, score in ((index, score) for equal, score in zip(batch, found, strict=True) for index in equal):
                scores[index] = score
                answered(index, score)
        return [scores[index] for index in range(len(pairs))]

    @override
    def embed(self, items: Sequence[Item], answered: Answered = ignore) -> NDArray[np.float32]:
        if self._model.score_row is not None:
            raise UsageError("The model is a reranker and cannot embed items.", "Pass --task rerank.")
        vectors = []
        for index, item in enumerate(items):
            hidden = self._read(self._builder.item(item), [item])
            vectors.append((hidden / np.linalg.norm(hidden)).astype(np.float32))
            answered(index, vectors[-1])
        return np.stack(vectors)

    @override
    def prompt_seen(self, question: Pair | Item) -> PromptSeen:
        if isinstance(question, Pair) and (text := ranked_text(question, self._model)) is not None:
            return PromptSeen(tuple(self._contexts.token_ids(text)))
        prompt = self._builder.pair(question) if isinstance(question, Pair) else self._builder.item(question)
        return PromptSeen(prompt.token_ids, tuple(picture.grid_thw for picture in prompt.pictures))

    def token_ids(self, text: str) -> list[int]:
        """llama.cpp's ids of a prompt, after the official tokenizer's normalisation."""
        return self._contexts.token_ids(normalized(text))

    @cached_property
    def _builder(self) -> TextPromptBuilder:
        return prompt_builder(self._model, self._contexts.token_ids)

    def _scores(
        self, pairs: Sequence[Pair], row: NDArray[np.float64]
    ) -> Iterator[tuple[Sequence[Sequence[int]], Sequence[float]]]:
        """The indices of equal pairs, and one score for each group of them."""
        by_server: list[list[int]] = []
        by_head: list[list[int]] = []
        for equal in distinct_pairs(pairs):
            (by_server if self._is_for_server(pairs[equal[0]]) else by_head).append(equal)
        for _, group in groupby(by_server, lambda equal: query_content(pairs[equal[0]].query)):
            documents = list(group)
            for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
                batch = documents[start : start + _DOCUMENTS_AT_ONCE]
                yield batch, self._rank([pairs[equal[0]] for equal in batch])
        for equal in by_head:
            pair = pairs[equal[0]]
            yield [equal], [float(self._read(self._builder.pair(pair), [pair.query, pair.document]) @ row)]

    def _is_for_server(self, pair: Pair) -> bool:
        """Whether /v1/rerank can score the pair: it neither truncates nor takes more than a context."""
        text = ranked_text(pair, self._model)
        limit = min(self._contexts.options.context, self._model.prompt.truncation.max_length)
        # A token has at least one byte, so a short text need not be tokenized.
        return text is not None and (len(text.encode()) < limit or len(self._contexts.token_ids(text)) < limit)

    def _rank(self, pairs: Sequence[Pair]) -> list[float]:
        query, *documents = (
            side_text(item, self._model.prompt) for item in (pairs[0].query, *(pair.document for pair in pairs))
        )
        answers = self._contexts.context(Pooling.RANK).rank(f"query {pairs[0].query.id!r}", query, documents)
        for pair, answer in zip(pairs, answers, strict=True):
            _check_finite(pair.name, answer)
        return [log_odds(answer) for answer in answers]

    def _read(self, prompt: TextPrompt, items: Sequence[Item]) -> NDArray[np.float64]:
        """The hidden state of the last token."""
        if prompt.pictures and self._contexts.mmproj is None:
            raise UsageError(
                f"{prompt.name} contains a picture, but the model's projector is missing.", "Pass its mmproj file."
            )
        context = self._contexts.context(Pooling.LAST, len(prompt.token_ids))
        hidden, count = context.read(
            prompt.name, request_of(prompt, items, context.media_marker if prompt.pictures else "")
        )
        if count != len(prompt.token_ids):
            raise ModelError(
                f"{prompt.name}: llama.cpp read {count:,} tokens; the official prompt has {len(prompt.token_ids):,}.",
                "A prompt with pictures must not exceed the model's length: llama.cpp cannot take a truncated one.",
            )
        _check_finite(prompt.name, hidden)
        return hidden


def _check_finite(name: str, answer: float | NDArray[np.float64]) -> None:
    if not np.isfinite(answer).all():
        raise ModelError(
            f"{name}: The model's answer is not a finite number.",
            "The weights are broken, or llama.cpp cannot run them as they are stored; qtool inspect FILE says so.",
        )
