"""The rows of a rank head beside the vocabulary's rows of yes and no, in the same GGUF file.

Rule: only of a file on this disk, and four rows of it. A head that is neither those rows nor the same exchanged is no
fault: it was trained by itself, or taken from an untied vocabulary head that is not in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from qtool.arch.spec import Task
from qtool.gguf_file.head_rows import TOKENS_KEY, HeadOrder, Read, head_order
from qtool.gguf_file.reader import GgufTensor
from qtool.inspection.finding import Finding
from qtool.inspection.language import LanguageModel
from qtool.inspection.place import Place


def head_findings(place: Place, model: LanguageModel) -> Iterator[Finding]:
    """Whether the first row of a reranker's head is yes."""
    if model.task is not Task.RERANK or not place.is_local:
        return
    if head_order(model.file.tensors, model.file.texts(TOKENS_KEY), _reader(place, model)) is HeadOrder.EXCHANGED:
        yield model.found("gguf-head-exchanged")


def _reader(place: Place, model: LanguageModel) -> Read:
    part_of = {name: file for file, part in model.file.parts.items() for name in part.tensors}

    def read(tensor: GgufTensor, start: int, nbytes: int) -> bytes:
        (data,) = place.read_spans(part_of[tensor.gguf_name], [(tensor.offset + start, nbytes)]) or [b""]
        return data

    return read
