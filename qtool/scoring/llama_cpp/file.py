"""What a GGUF file says of itself, as far as scoring with it goes.

Rule: a file that llama.cpp would load and score wrongly in silence is refused here, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from qtool.arch.prompts import NO, YES, PromptSpec, embedder_prompt, reranker_prompt
from qtool.arch.spec import Task
from qtool.errors import ModelError
from qtool.gguf_file.reader import GgufFile, GgufTensor, read_gguf

if TYPE_CHECKING:
    from numpy.typing import NDArray

IS_VISION: Final[Mapping[str, bool]] = {"qwen3": False, "qwen3vl": True}
RANK_HEAD: Final = "cls.output.weight"
RERANK_TEMPLATE: Final = "tokenizer.chat_template.rerank"
QUERY: Final = "{query}"
DOCUMENT: Final = "{document}"

_TASK_OF_POOLING: Final = {3: Task.EMBED, 4: Task.RERANK}  # llama.cpp's LAST and RANK
_CONTROL: Final = 3
"""llama.cpp's type of special tokens, to which its converter adds <|fim_prefix|> and its like; a prompt that is cut keeps those."""
_PART: Final = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GgufModel:
    """A file that can score; pictures come to it as vectors of `width`, with `deepstack` more for its first layers.

    Of a reranker, `score_row` [width] is w_yes - w_no and `rank_template` the baked prompt.
    """

    path: Path
    prompt: PromptSpec
    tokens: Sequence[str]
    special_ids: frozenset[int]
    width: int
    deepstack: int = 0
    rank_template: str = ""
    score_row: NDArray[np.float64] | None = None

    @property
    def task(self) -> Task:
        """What its pooling makes of it."""
        return Task.EMBED if self.score_row is None else Task.RERANK

    @property
    def family(self) -> str:
        """As `arch` names it."""
        return "qwen3_vl" if self.prompt.sees_pictures else "qwen3"

    @property
    def baked_instruction(self) -> str | None:
        """The instruction in the baked prompt; None where the rest of it is not the official prompt."""
        before, after = self.prompt.template.split("{instruction}")
        template = self.rank_template
        if len(template) >= len(before + after) and template.startswith(before) and template.endswith(after):
            return template[len(before) : len(template) - len(after)]
        return None


def read_model(path: Path) -> GgufModel:
    """Read the header of a language model (of split files the first part) and, of a reranker, its head."""
    header = read_gguf(path)
    architecture = header.get("general.architecture")
    if architecture not in IS_VISION:
        raise ModelError(f"{path} holds the architecture {architecture!r}; known are {', '.join(IS_VISION)}.")
    task = _task(header, architecture)
    prompt_of = reranker_prompt if task is Task.RERANK else embedder_prompt
    kinds = header.get("tokenizer.ggml.token_type", [])
    model = GgufModel(
        path,
        prompt_of(is_vision=IS_VISION[architecture]),
        header.get("tokenizer.ggml.tokens", []),
        frozenset(token for token, kind in enumerate(kinds) if kind == _CONTROL),
        header.get(f"{architecture}.embedding_length"),
        header.get(f"{architecture}.n_deepstack_layers", 0),
    )
    return model if task is Task.EMBED else _reranker(model, header, architecture)


def check_projector(mmproj: Path, model: GgufModel) -> None:
    """Raise ModelError unless the projector's vectors fit into the model; whose they are no file says."""
    projector = read_gguf(mmproj)
    if projector.get("general.architecture") != "clip":
        raise ModelError(f"{mmproj} is no projector: its architecture is {projector.get('general.architecture')!r}.")
    if not model.prompt.sees_pictures:
        raise ModelError(f"{model.path} reads text only and takes no projector.")
    width = projector.get("clip.vision.projection_dim")
    deepstack = sum(projector.get("clip.vision.is_deepstack_layers", []))
    if (width, deepstack) != (model.width, model.deepstack):
        raise ModelError(
            f"{mmproj} gives vectors of {width} from {deepstack} deepstack layers, "
            f"{model.path} reads {model.width} from {model.deepstack}.",
            "The projector belongs to another model.",
        )


def _task(header: GgufFile, architecture: str) -> Task:
    pooling = header.get(f"{architecture}.pooling_type")
    if pooling not in _TASK_OF_POOLING:
        raise ModelError(
            f"{header.name} says {architecture}.pooling_type = {pooling}; a reranker says 4, an embedder 3.",
            "llama.cpp's converter writes a plain language model where it does not recognise the task.",
        )
    return _TASK_OF_POOLING[pooling]


def _reranker(model: GgufModel, header: GgufFile, architecture: str) -> GgufModel:
    labels = header.get(f"{architecture}.classifier.output_labels")
    if labels != [YES, NO]:
        raise ModelError(f"{model.path} labels its scores {labels}; llama.cpp ranks by the first of [yes, no].")
    template = header.get(RERANK_TEMPLATE, "")
    if template.count(QUERY) != 1 or template.count(DOCUMENT) != 1:
        raise ModelError(f"{model.path} cannot rank: {RERANK_TEMPLATE} is missing or lacks {QUERY} or {DOCUMENT}.")
    return replace(model, rank_template=template, score_row=_score_row(header, model))


def _score_row(header: GgufFile, model: GgufModel) -> NDArray[np.float64]:
    for part, tensors in _parts(model.path, header):
        if RANK_HEAD in tensors:
            head = _read_rows(part, tensors[RANK_HEAD])
            if head.shape != (2, model.width):
                raise ModelError(f"{part}: {RANK_HEAD} has shape {list(head.shape)}, expected [2, {model.width}].")
            return np.asarray(head[0] - head[1])
    raise ModelError(
        f"{model.path} cannot rank: it has no {RANK_HEAD}.",
        "llama.cpp would give scores of about 1e-20 without an error.",
    )


def parts_of(path: Path) -> list[Path]:
    """The files of a split model, of which `path` is the first; otherwise `path` alone."""
    match = _PART.fullmatch(path.name)
    numbers = range(2, int(match[2]) + 1 if match else 0)
    return [path, *(path.with_name(path.name.replace("-00001-of-", f"-{number:05}-of-")) for number in numbers)]


def _parts(path: Path, header: GgufFile) -> Iterator[tuple[Path, Mapping[str, GgufTensor]]]:
    yield path, header.tensors
    for part in parts_of(path)[1:]:
        yield part, read_gguf(part).tensors


def _read_rows(path: Path, tensor: GgufTensor) -> NDArray[np.float64]:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset).reshape(tensor.shape[0], -1)
    try:
        rows = dequantize(stored, GGMLQuantizationType(tensor.type.number))
    except NotImplementedError:
        raise ModelError(
            f"{path}: {tensor.gguf_name} is stored as {tensor.type.name}, which no head should be."
        ) from None
    return np.asarray(rows, dtype=np.float64)
