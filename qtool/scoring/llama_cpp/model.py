"""What a GGUF file says of itself, as far as scoring with it goes.

Rule: a file that llama.cpp would load and score wrongly in silence is refused here, with the reason.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from qtool.arch.gguf_names import RANK_HEAD
from qtool.arch.prompts import NO, YES, PromptSpec, embedder_prompt, reranker_prompt
from qtool.arch.spec import Task
from qtool.errors import ModelError
from qtool.storage.gguf import GgufFile, GgufTensor, read_gguf
from qtool.storage.head_rows import HeadOrder, head_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

IS_VISION: Final[Mapping[str, bool]] = {"qwen3": False, "qwen3vl": True}
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
    def architecture(self) -> str:
        """As GGUF files name it."""
        return next(name for name, is_vision in IS_VISION.items() if is_vision == self.prompt.sees_pictures)

    @property
    def baked_instruction(self) -> str | None:
        """The instruction in the baked prompt; None where the rest of it is not the official prompt."""
        return _instruction_in(self.rank_template, self.prompt)

    @property
    def has_prompt_of_other_family(self) -> bool:
        """Whether the baked prompt is the official one, but of rerankers that see pictures where this does not, or vice versa."""
        other = reranker_prompt(is_vision=not self.prompt.sees_pictures)
        return self.score_row is not None and _instruction_in(self.rank_template, other) is not None


def _instruction_in(template: str, prompt: PromptSpec) -> str | None:
    before, after = prompt.template.split("{instruction}")
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
        key = f"{architecture}.pooling_type"
        said = f"has no {key}" if pooling is None else f"says {key} = {pooling}"
        raise ModelError(
            f"{header.name} {said}; a reranker says 4, an embedder 3.",
            "So a conversion ends that does not recognise the task. Repair it (an embedder with --task embed): "
            + repairing(Path(header.name)),
        )
    return _TASK_OF_POOLING[pooling]


def repairing(path: Path) -> str:
    """The command that gives a file what it lacks to rank."""
    if len(parts_of(path)) > 1:
        whole = f"llama-gguf-split --merge {shlex.quote(str(path))} WHOLE.gguf, then "
        return f"{whole}qtool repair-gguf WHOLE.gguf -o FIXED.gguf --task {Task.RERANK.value}"
    return f"qtool repair-gguf {shlex.quote(str(path))} -o FIXED.gguf --task {Task.RERANK.value}"


def _reranker(model: GgufModel, header: GgufFile, architecture: str) -> GgufModel:
    row = _score_row(header, model)
    hint = f"Repair it: {repairing(model.path)}"
    labels = header.get(f"{architecture}.classifier.output_labels")
    if labels is None:
        raise ModelError(f"{model.path} does not say which row of its rank head is yes: its labels are missing.", hint)
    if labels != [YES, NO]:
        raise ModelError(f"{model.path} labels its scores {labels}; llama.cpp ranks by the first of [yes, no].", hint)
    template = header.get(RERANK_TEMPLATE, "")
    if template.count(QUERY) != 1 or template.count(DOCUMENT) != 1:
        raise ModelError(
            f"{model.path} cannot rank: {RERANK_TEMPLATE} is missing or lacks {QUERY} or {DOCUMENT}.", hint
        )
    return replace(model, rank_template=template, score_row=row)


def _score_row(header: GgufFile, model: GgufModel) -> NDArray[np.float64]:
    """The row whose product with the last hidden vector is the log-odds of yes."""
    parts = dict(_parts(model.path, header))
    tensors = {name: tensor for held in parts.values() for name, tensor in held.items()}
    part_of = {name: part for part, held in parts.items() for name in held}
    if RANK_HEAD not in tensors:
        raise ModelError(
            f"{model.path} cannot rank: it has no {RANK_HEAD}, and llama.cpp would give scores of about 1e-20 without "
            "an error.",
            f"Repair it: {repairing(model.path)}",
        )
    head = _read_head(part_of[RANK_HEAD], tensors[RANK_HEAD], model)

    def read(tensor: GgufTensor, start: int, nbytes: int) -> bytes:
        return np.fromfile(part_of[tensor.gguf_name], np.uint8, nbytes, offset=tensor.offset + start).tobytes()

    if head_order(tensors, model.tokens, read) is HeadOrder.EXCHANGED:
        raise ModelError(
            f"{model.path} would rank upside down: the rows of {RANK_HEAD} are [no, yes], and llama.cpp ranks by the first.",
            f"Repair it: {repairing(model.path)}",
        )
    return np.asarray(head[0] - head[1])


def _read_head(part: Path, tensor: GgufTensor, model: GgufModel) -> NDArray[np.float64]:
    head = _read_rows(part, tensor)
    if head.shape != (2, model.width):
        raise ModelError(
            f"{part}: {RANK_HEAD} has shape {list(head.shape)}, expected [2, {model.width}].",
            "Convert the original again: qtool convert-gguf MODEL -o OUT",
        )
    return head


def parts_of(path: Path) -> list[Path]:
    """The files of a split model, of which `path` is the first; otherwise `path` alone."""
    match = _PART.fullmatch(path.name)
    numbers = range(2, int(match[2]) + 1 if match else 0)
    return [path, *(path.with_name(path.name.replace("-00001-of-", f"-{number:05}-of-")) for number in numbers)]


def stored_tensors(path: Path) -> Mapping[str, GgufTensor]:
    """The tensors of a model, in however many files."""
    return {name: tensor for part in parts_of(path) for name, tensor in read_gguf(part).tensors.items()}


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
            f"{path}: {tensor.gguf_name} is stored as {tensor.type.name}, which no head should be.",
            f"Repair it: {repairing(path)} --base MODEL",
        ) from None
    return np.asarray(rows, dtype=np.float64)
