"""The vision projector of a GGUF pair, by itself and beside its language model.

Rule: a projector fits if its vectors are as wide as the language model's and it feeds as many of its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gguf.constants import VisionProjectorType

from qtool.arch.qwen3_vl import vision_tensors
from qtool.convert.mmproj import ARCHITECTURE
from qtool.convert.names import PATCH_EMBEDDINGS, gguf_name_of
from qtool.gguf_file.values import Kind
from qtool.inspection.catalogue import finding, listed
from qtool.inspection.finding import Finding
from qtool.inspection.gguf_model import GgufModel
from qtool.inspection.gguf_tensors import Shape, compare
from qtool.inspection.language import LanguageModel

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
    missing = list(_missing_fields(projector))
    if missing:
        yield projector.found("mmproj-missing-field", field=listed(missing))
        return
    flags = projector.file.elements(f"{_VISION}is_deepstack_layers", frozenset({Kind.BOOL}))
    flagged = [layer for layer, flag in enumerate(flags) if flag]
    if flagged != projector.deepstack_layers:
        yield projector.found("mmproj-deepstack-flags", flagged=flagged, found=projector.deepstack_layers)
    expected, found = _expected(projector), {name: tensor.shape for name, tensor in projector.file.tensors.items()}
    absent, misshapen = compare(expected, found)
    if absent:
        yield projector.found("mmproj-missing-tensor", tensors=listed(absent))
    for name in misshapen[:1]:
        yield projector.found(
            "mmproj-tensor-shape", tensor=name, found=list(found[name]), expected=list(expected[name])
        )


def _missing_fields(projector: Projector) -> Iterator[str]:
    for field in (*_FIELDS, "image_size"):
        if (projector.integer(field) or 0) < 1:
            yield _VISION + field
    for field in _STATISTICS:
        if len(projector.file.elements(_VISION + field, frozenset({Kind.FLOAT32, Kind.FLOAT64}))) != 3:
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


def _expected(projector: Projector) -> Mapping[str, Shape]:
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
