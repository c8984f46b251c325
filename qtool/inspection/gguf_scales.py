"""The global scales of NVFP4 tensors in a GGUF file.

Rule: llama.cpp multiplies each product by its own scale and takes 1 where there is none, so a missing one is silent and
an unequal one harmless there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Final

from qtool.formats.ggml import F32, NVFP4
from qtool.gguf_file.ignored_scales import ignored_scales
from qtool.inspection.catalogue import listed_are
from qtool.inspection.finding import Finding
from qtool.inspection.language import LanguageModel
from qtool.inspection.place import Place

_FUSED: Final = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))


def scale_findings(place: Place, model: LanguageModel) -> Iterator[Finding]:
    """Whether each NVFP4 tensor has its global scale whether that is a number to scale with, and whether it is used."""
    packed = [name for name, tensor in model.file.tensors.items() if tensor.type is NVFP4]
    scales = [name.removesuffix(".weight") + ".scale" for name in packed]
    missing = [name for name in scales if name not in model.file.tensors]
    if packed and len(missing) == len(packed):
        yield model.found("nvfp4-no-scales")
        return
    if missing:
        yield model.found("nvfp4-missing-scale", tensors=listed_are(missing))
    if ignored_scales(model.family.gguf_architecture, model.file.tensors):
        yield model.found("nvfp4-scales-ignored")
    values = _values(place, model, frozenset(scales))
    if values is None:
        yield model.found("nvfp4-scales-unread")
        return
    bad = [name for name, value in values.items() if not isfinite(value) or value <= 0]
    for name in bad[:1]:
        yield model.found("nvfp4-bad-scale", tensor=name, value=values[name])
    for group in () if bad else list(_unequal_groups(values))[:1]:
        yield model.found("nvfp4-unequal-source", group=group)


def _values(place: Place, model: LanguageModel, scales: frozenset[str]) -> Mapping[str, float] | None:
    values: dict[str, float] = {}
    for file, part in model.file.parts.items():
        stored = [each for name, each in part.tensors.items() if name in scales and each.type is F32]
        data = place.read_spans(file, [(each.offset, 4) for each in stored])
        if data is None:
            return None
        values |= {each.gguf_name: struct.unpack("<f", raw)[0] for each, raw in zip(stored, data, strict=True)}
    return values


def _unequal_groups(values: Mapping[str, float]) -> Iterator[str]:
    for block in dict.fromkeys(name.rpartition(".attn_q.")[0] or name.rpartition(".ffn_gate.")[0] for name in values):
        for members in _FUSED:
            found = {values[name] for member in members if (name := f"{block}.{member}.scale") in values}
            if len(found) > 1:
                yield f"{block}.{' and '.join(members)}"
