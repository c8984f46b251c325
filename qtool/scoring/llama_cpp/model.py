"""A GGUF model as scoring with it needs it: prompt, tokens and rank head. What llama.cpp would score wrongly is refused."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from gguf.constants import PoolingType, TokenType

from qtool.arch.families import reranker_prompts
from qtool.arch.family import Family
from qtool.arch.prompts import ANSWERS, PromptSpec
from qtool.arch.spec import Task
from qtool.artefact import require_family
from qtool.errors import ModelError
from qtool.scoring.llama_cpp.loadable import require_loadable
from qtool.storage.gguf_model import RANK_HEAD, RERANK_KEY, TOKENS_KEY, GgufModel, decode, open_gguf_file
from qtool.storage.head_rows import HeadOrder, head_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

QUERY: Final = "{query}"
DOCUMENT: Final = "{document}"

_TASK_OF_POOLING: Final = {PoolingType.LAST: Task.EMBED, PoolingType.RANK: Task.RERANK}


@dataclass(frozen=True)
class LlamaCppModel:
    """A GGUF model that can score; pictures come to it as vectors of `width`.

    `special_ids` are the tokens of the type CONTROL, to which llama.cpp's converter adds <|fim_prefix|> and its like; a
    prompt that is cut keeps those. Of a reranker, `score_row` [width] is w_yes - w_no and `rank_template` the baked prompt.
    """

    file: GgufModel
    family: Family
    prompt: PromptSpec
    tokens: Sequence[str]
    special_ids: frozenset[int]
    width: int
    rank_template: str = ""
    score_row: NDArray[np.float64] | None = None

    @property
    def path(self) -> Path:
        """The file that llama.cpp loads; of a split model the first part."""
        return self.file.path

    @property
    def task(self) -> Task:
        """What its pooling makes of it."""
        return Task.EMBED if self.score_row is None else Task.RERANK

    @property
    def baked_instruction(self) -> str | None:
        """The instruction in the baked prompt; None where the rest of it is not the official prompt."""
        return self.prompt.instruction_in(self.rank_template)

    @property
    def other_familys_prompt(self) -> PromptSpec | None:
        """The official prompt of another family's rerankers, where that is what was baked."""
        others = (prompt for prompt in reranker_prompts() if self.score_row is not None and prompt != self.prompt)
        return next((prompt for prompt in others if prompt.instruction_in(self.rank_template) is not None), None)


def read_model(path: Path) -> LlamaCppModel:
    """Read the header of a language model's file and, of a reranker, its head."""
    return scoring_model(open_gguf_file(path))


def scoring_model(file: GgufModel) -> LlamaCppModel:
    """What scoring needs of a model whose headers have been read; reads a reranker's head. Raises ModelError."""
    file.require_whole()
    family = require_family(file)
    require_loadable(file, family)
    task = _task(file)
    kinds = file.integers("tokenizer.ggml.token_type")
    model = LlamaCppModel(
        file,
        family,
        family.prompt(task),
        file.texts(TOKENS_KEY),
        frozenset(token for token, kind in enumerate(kinds) if kind == TokenType.CONTROL),
        file.integer(file.key("embedding_length")) or 0,
    )
    return model if task is Task.EMBED else _reranker(model)


def _task(file: GgufModel) -> Task:
    key = file.key("pooling_type")
    pooling = file.integer(key)
    if pooling not in _TASK_OF_POOLING:
        found = f"has no {key}" if pooling is None else f"has {key} = {pooling}"
        rank, last = int(PoolingType.RANK), int(PoolingType.LAST)
        raise ModelError(
            f"{file.target} {found}; a reranker has {rank}, an embedder {last}.",
            "A converter that did not recognise the task leaves such a file. Repair it (an embedder with --task embed): "
            + repair_command(file),
        )
    return _TASK_OF_POOLING[PoolingType(pooling)]


def repair_command(file: GgufModel) -> str:
    """The command that gives a file what it lacks to rank."""
    broken, merge = shlex.quote(file.target), ""
    if len(file.parts) > 1:
        broken, merge = "WHOLE.gguf", f"llama-gguf-split --merge {broken} WHOLE.gguf, then "
    return f"{merge}qtool repair-gguf {broken} -o FIXED.gguf --task {Task.RERANK.value}"


def _reranker(model: LlamaCppModel) -> LlamaCppModel:
    file, hint = model.file, f"Repair it: {repair_command(model.file)}"
    row = _score_row(model, hint)
    labels = list(file.texts(file.key("classifier.output_labels")))
    if not labels:
        raise ModelError(f"{file.target} does not say which row of its rank head is yes: its labels are missing.", hint)
    if labels != list(ANSWERS):
        raise ModelError(f"{file.target} labels its scores {labels}; llama.cpp ranks by the first of [yes, no].", hint)
    template = file.text(RERANK_KEY) or ""
    if template.count(QUERY) != 1 or template.count(DOCUMENT) != 1:
        raise ModelError(f"{file.target} cannot rank: {RERANK_KEY} is missing or lacks {QUERY} or {DOCUMENT}.", hint)
    return replace(model, rank_template=template, score_row=row)


def _score_row(model: LlamaCppModel, hint: str) -> NDArray[np.float64]:
    """The row whose product with the last hidden vector is the log-odds of yes."""
    file = model.file
    tensor = file.tensors.get(RANK_HEAD)
    if tensor is None:
        raise ModelError(
            f"{file.target} cannot rank: it has no {RANK_HEAD}, and llama.cpp would give scores of about 1e-20 without "
            "an error.",
            hint,
        )
    if tensor.shape != (2, model.width):
        raise ModelError(
            f"{file.target}: {RANK_HEAD} has shape {list(tensor.shape)}, expected [2, {model.width}].",
            "Convert the original again: qtool convert-gguf MODEL -o OUT",
        )
    try:
        head = decode(file.read_rows(tensor, (0, 1)), tensor.type).astype(np.float64)
    except NotImplementedError:
        raise ModelError(
            f"{file.target}: {RANK_HEAD} is stored as {tensor.type.name}, which cannot be decoded.",
            f"Repair it: {repair_command(file)} --base MODEL",
        ) from None
    if head_order(file, ANSWERS) is HeadOrder.EXCHANGED:
        raise ModelError(
            f"{file.target} would rank upside down: the rows of {RANK_HEAD} are [no, yes], and llama.cpp ranks by the "
            "first.",
            hint,
        )
    return np.asarray(head[0] - head[1])
