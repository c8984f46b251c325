"""The tensors of a GGUF model and of its projector against those that its own fields promise."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, Final

from gguf.constants import GGUFValueType, VisionProjectorType

from qtool.arch.gguf_names import OUTPUT, PATCH_EMBEDDINGS, TOKEN_EMBEDDING, gguf_name_of
from qtool.arch.qwen3 import decoder_tensors
from qtool.arch.qwen3_vl import vision_tensors
from qtool.arch.spec import Task, TensorSpec
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.gguf_language import LanguageModel
from qtool.checks.report import StoredTensor
from qtool.export.gguf_metadata import ARCHITECTURE
from qtool.formats.ggml import F32, NVFP4
from qtool.storage.gguf import GgufTensor
from qtool.storage.gguf_model import GgufModel
from qtool.storage.head_rows import TOKENS_KEY, HeadOrder, Read, head_order, ignored_scales
from qtool.storage.location import ArtefactLocation

# The tensors of a GGUF file against those that its own fields promise. Names and shapes come from the declared
# architecture, as they do for checkpoints; sizes that no file of this many tensors can have are not even listed.


Shape = tuple[int, ...]

_REQUIRED: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_EPSILON: Final = "attention.layer_norm_rms_epsilon"
_MOST: Final = 1 << 16
_SCALES: Final = (".scale", ".input_scale")
_SPLIT, _FUSED = ("attn_q", "attn_k", "attn_v"), "attn_qkv"


def tensor_findings(model: LanguageModel) -> Iterator[Finding]:
    """What is missing, of another shape, or too much."""
    missing_fields = list(_missing_fields(model))
    if missing_fields:
        yield model.found("gguf-missing-field", field=listed(missing_fields))
        return
    expected = _expected(model)
    found = {name: tensor.shape for name, tensor in model.file.tensors.items()}
    known = [*expected, OUTPUT]
    missing, misshapen = compare(expected, found)
    if missing:
        yield model.found("gguf-missing-tensor", tensors=listed(missing))
    for name in misshapen[:1]:
        yield model.found("gguf-tensor-shape", tensor=name, found=list(found[name]), expected=list(expected[name]))
    unknown = [n for n in found if n not in known and not n.startswith("cls.") and not _is_scale(n, found)]
    if unknown:
        yield model.found("gguf-unknown-tensor", tensors=listed(unknown))


def _missing_fields(model: LanguageModel) -> Iterator[str]:
    for field in _REQUIRED:
        if (model.integer(field) or 0) < 1:
            yield model.key(field)
    if model.file.number(model.key(_EPSILON)) is None:
        yield model.key(_EPSILON)
    if model.head_dim < 1:
        yield model.key("attention.key_length")


def compare(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> tuple[list[str], list[str]]:
    """The names that are missing, and those of another shape."""
    missing = [name for name in expected if name not in found]
    return missing, [name for name, shape in expected.items() if name in found and found[name] != shape]


def stored_tensors(file: GgufModel) -> Iterator[StoredTensor]:
    """The tensors for the table of classes."""
    names = file.tensors
    for name, tensor in names.items():
        is_scale = _is_scale(name, names)
        yield StoredTensor(
            name, None if is_scale else tensor.type.name, 0 if is_scale else prod(tensor.shape), tensor.nbytes
        )


def _is_scale(name: str, names: Mapping[str, object]) -> bool:
    return any(name.endswith(suffix) and f"{name.removesuffix(suffix)}.weight" in names for suffix in _SCALES)


def _expected(model: LanguageModel) -> dict[str, Shape]:
    tokens = len(model.file.texts("tokenizer.ggml.tokens"))
    heads = model.integer("attention.head_count") or 0
    layers = min(model.integer("block_count") or 0, len(model.file.tensors) + 1, _MOST)
    config = {
        **{hf_field: model.integer(field) for field, hf_field in _REQUIRED.items()},
        "num_hidden_layers": layers,
        "num_key_value_heads": max(model.integer("attention.head_count_kv") or heads, 1),
        "head_dim": model.head_dim,
        "attention_bias": "blk.0.attn_q.bias" in model.file.tensors,
        "vocab_size": tokens or _rows_of_embedding(model),
    }
    expected = dict(_named(spec) for spec in decoder_tensors(config, "model."))
    for layer in range(layers):
        if f"blk.{layer}.{_FUSED}.weight" in model.file.tensors:
            parts = [expected.pop(f"blk.{layer}.{part}.weight") for part in _SPLIT]
            expected[f"blk.{layer}.{_FUSED}.weight"] = (sum(rows for rows, _ in parts), parts[0][1])
    return expected


def _rows_of_embedding(model: LanguageModel) -> int:
    embedding = model.file.tensors.get(TOKEN_EMBEDDING)
    return embedding.shape[0] if embedding else 1


def _named(spec: TensorSpec) -> tuple[str, Shape]:
    return str(gguf_name_of(spec.hf_name)), spec.shape


# The rows of a rank head beside the vocabulary's rows of yes and no, in the same GGUF file. Only of a file on this
# disk, and four rows of it. A head that is neither those rows nor the same exchanged is no fault: it was trained by
# itself, or taken from an untied vocabulary head that is not in the file.


def head_findings(place: ArtefactLocation, model: LanguageModel) -> Iterator[Finding]:
    """Whether the first row of a reranker's head is yes."""
    if model.task is not Task.RERANK or not place.is_local:
        return
    if head_order(model.file.tensors, model.file.texts(TOKENS_KEY), _reader(place, model)) is HeadOrder.EXCHANGED:
        yield model.found("gguf-head-exchanged")


def _reader(place: ArtefactLocation, model: LanguageModel) -> Read:
    part_of = {name: file for file, part in model.file.parts.items() for name in part.tensors}

    def read(tensor: GgufTensor, start: int, nbytes: int) -> bytes:
        (data,) = place.read_spans(part_of[tensor.gguf_name], [(tensor.offset + start, nbytes)]) or [b""]
        return data

    return read


# The global scales of NVFP4 tensors in a GGUF file. Llama.cpp multiplies each product by its own scale and takes 1
# where there is none, so a missing one is silent and an unequal one harmless there.


_FUSED_GROUPS: Final = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))


def scale_findings(place: ArtefactLocation, model: LanguageModel) -> Iterator[Finding]:
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


def _values(place: ArtefactLocation, model: LanguageModel, scales: frozenset[str]) -> Mapping[str, float] | None:
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
        for members in _FUSED_GROUPS:
            found = {values[name] for member in members if (name := f"{block}.{member}.scale") in values}
            if len(found) > 1:
                yield f"{block}.{' and '.join(members)}"


# The vision projector of a GGUF pair, by itself and beside its language model. A projector fits if its vectors are as
# wide as the language model's and it feeds as many of its layers.


_TYPE: Final[str] = VisionProjectorType.QWEN3VL
_TYPE_KEYS: Final = ("clip.projector_type", "clip.vision.projector_type")
_VISION: Final = f"{ARCHITECTURE}.vision."
_FIELDS: Final = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "depth",
    "patch_size": "patch_size",
    "projection_dim": "out_hidden_size",
}
_STATISTICS: Final = ("image_mean", "image_std")


@dataclass(frozen=True)
class Projector:
    """A GGUF file with a vision tower."""

    file: GgufModel

    @property
    def type(self) -> str:
        """Which family's projector it is."""
        return next((text for key in _TYPE_KEYS if (text := self.file.text(key))), "unknown")

    @property
    def is_known(self) -> bool:
        """Whether it is one of the family's."""
        return self.type == _TYPE

    @property
    def width(self) -> int | None:
        """Length of the vectors that it gives."""
        return self.integer("projection_dim")

    @property
    def deepstack_layers(self) -> list[int]:
        """The vision layers that have a deepstack merger."""
        names = (name.split(".") for name in self.file.tensors if name.startswith("v.deepstack."))
        return sorted({int(parts[2]) for parts in names if len(parts) > 3 and parts[2].isdecimal()})

    def integer(self, name: str) -> int | None:
        """A whole number among the vision fields."""
        return self.file.integer(_VISION + name)

    def found(self, code: str, **facts: Any) -> Finding:
        """A finding about this file."""
        return finding(code, self.file.target, projector=self.file.name, **facts)


def projector_findings(projector: Projector) -> Iterator[Finding]:
    """What is wrong with the projector by itself."""
    missing = list(_missing_projector_fields(projector))
    if missing:
        yield projector.found("mmproj-missing-field", field=listed(missing))
        return
    flags = projector.file.elements(f"{_VISION}is_deepstack_layers", frozenset({GGUFValueType.BOOL}))
    flagged = [layer for layer, flag in enumerate(flags) if flag]
    if flagged != projector.deepstack_layers:
        yield projector.found("mmproj-deepstack-flags", flagged=flagged, found=projector.deepstack_layers)
    expected, found = (
        _expected_projector(projector),
        {name: tensor.shape for name, tensor in projector.file.tensors.items()},
    )
    absent, misshapen = compare(expected, found)
    if absent:
        yield projector.found("mmproj-missing-tensor", tensors=listed(absent))
    for name in misshapen[:1]:
        yield projector.found(
            "mmproj-tensor-shape", tensor=name, found=list(found[name]), expected=list(expected[name])
        )


def _missing_projector_fields(projector: Projector) -> Iterator[str]:
    for field in (*_FIELDS, "image_size"):
        if (projector.integer(field) or 0) < 1:
            yield _VISION + field
    floats = frozenset({GGUFValueType.FLOAT32, GGUFValueType.FLOAT64})
    for field in _STATISTICS:
        if len(projector.file.elements(_VISION + field, floats)) != 3:
            yield _VISION + field
    if not projector.file.flag("clip.has_vision_encoder"):
        yield "clip.has_vision_encoder"


def pair_findings(model: LanguageModel, projectors: list[Projector]) -> Iterator[Finding]:
    """Whether each of `projectors` fits `model`; a text model needs none."""
    if not model.family.is_vision:
        return
    if not projectors:
        yield model.found("mmproj-missing")
    for projector in projectors:
        yield from _match_findings(model, projector)


def projector_markers(projector: Projector) -> Iterator[tuple[str, str]]:
    """The projector as a person reads it."""
    yield "projector type", projector.type
    yield "width", str(projector.width or "missing")
    yield "deepstack", ", ".join(map(str, projector.deepstack_layers)) or "none"


def _match_findings(model: LanguageModel, projector: Projector) -> Iterator[Finding]:
    name = projector.file.name
    if not projector.is_known:
        yield model.found("mmproj-type", projector=name, found=projector.type, expected=_TYPE)
        return
    width, layers = model.integer("embedding_length"), model.integer("n_deepstack_layers") or 0
    if projector.width != width:
        yield model.found("mmproj-width", projector=name, found=projector.width or "unknown width", expected=width)
    if len(projector.deepstack_layers) != layers:
        count = len(projector.deepstack_layers)
        yield model.found("mmproj-deepstack", projector=name, found=count, expected=layers)


def _expected_projector(projector: Projector) -> Mapping[str, Shape]:
    config: dict[str, Any] = {hf_field: projector.integer(field) for field, hf_field in _FIELDS.items()}
    merge = projector.integer("spatial_merge_size") or 0
    config |= {
        "depth": min(config["depth"], len(projector.file.tensors) + 1),
        "num_position_embeddings": ((projector.integer("image_size") or 0) // config["patch_size"]) ** 2 or 1,
        "deepstack_visual_indexes": projector.deepstack_layers,
        **({"spatial_merge_size": merge} if merge > 0 else {}),
    }
    expected: dict[str, Shape] = {}
    for spec in vision_tensors(config):
        name = str(gguf_name_of(spec.hf_name, config["deepstack_visual_indexes"]))
        if name == PATCH_EMBEDDINGS[0]:  # a convolution over two frames, one tensor each
            expected |= dict.fromkeys(PATCH_EMBEDDINGS, (*spec.shape[:2], *spec.shape[3:]))
        else:
            expected[name] = spec.shape
    return expected
