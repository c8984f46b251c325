"""A safetensors checkpoint of a known family: its tensors, packed weights with their scales, by canonical name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any, Final

from qtool.arch.detect import Detection
from qtool.arch.family import Family
from qtool.arch.spec import TensorSpec, dimension, layers
from qtool.artefact import CheckpointArtefact
from qtool.checks.findings import Finding, finding
from qtool.checks.positions import Positions
from qtool.checks.report import ClassedTensor
from qtool.storage.checkpoint import MOST_MISSING, Checkpoint, TensorInfo
from qtool.storage.gguf_model import RANK_HEAD
from qtool.storage.location import ArtefactLocation
from qtool.storage.packed import BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE, PACKED, WEIGHT

if TYPE_CHECKING:
    from typing_extensions import Self

TOKENIZER: Final = "tokenizer.json"


@dataclass(frozen=True)
class CheckpointModel:
    """An opened checkpoint and where all its files lie."""

    artefact: CheckpointArtefact
    location: ArtefactLocation

    @classmethod
    def of(cls, artefact: CheckpointArtefact) -> Self:
        """The model where it lies."""
        return cls(artefact, artefact.location)

    @property
    def target(self) -> str:
        """How a command names it."""
        return self.location.path_of("")

    @property
    def names(self) -> Sequence[str]:
        """The paths of all its files."""
        return self.location.names

    @property
    def checkpoint(self) -> Checkpoint:
        """Its config and headers."""
        return self.artefact.checkpoint

    @property
    def detection(self) -> Detection:
        """Its architecture and task."""
        return self.artefact.detection

    def found(self, code: str, **facts: Any) -> Finding:
        """A finding about this checkpoint."""
        return finding(code, self.target, **facts)

    @property
    def family(self) -> Family:
        """The family of the architecture."""
        return self.detection.family

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor that the architecture may have."""
        _ = self.deepstack_layers  # refuses what the architecture would stumble over
        declared = self.detection.architecture.tensors(self.detection.config)
        return {spec.hf_name: spec for spec in islice(declared, len(self.checkpoint.tensors) + MOST_MISSING)}

    @cached_property
    def weights(self) -> Mapping[str, TensorInfo]:
        """The stored tensors that the architecture knows, by canonical name."""
        named = ((self.canonical(name), info) for name, info in self.checkpoint.tensors.items())
        return {name: info for name, info in named if name in self.specs}

    @cached_property
    def companions(self) -> Mapping[str, TensorInfo]:
        """The scales of packed weights, by canonical name."""
        named = ((self.canonical(name), info) for name, info in self.checkpoint.tensors.items())
        return {name: info for name, info in named if name not in self.specs and self.owner(name) in self.packed}

    @cached_property
    def packed(self) -> Mapping[str, TensorInfo]:
        """The weights that are stored packed."""
        return {name: info for name, info in self.weights.items() if info.dtype == PACKED}

    def canonical(self, hf_name: str) -> str:
        """The name with the prefix that base-model checkpoints leave out."""
        full = self.detection.architecture.prefix + hf_name
        return full if hf_name not in self.specs and (full in self.specs or self.owner(full) in self.specs) else hf_name

    @staticmethod
    def owner(hf_name: str) -> str:
        """The weight that a scale belongs to."""
        suffix = next((s for s in (GLOBAL_SCALE, BLOCK_SCALE, INPUT_SCALE) if hf_name.endswith(s)), "")
        return hf_name.removesuffix(suffix) + WEIGHT if suffix else ""

    @cached_property
    def tokenizer(self) -> Mapping[str, Any] | None:
        """tokenizer.json where it lies on this disk: over the network its 11 MB would be most of what is fetched."""
        return self.artefact.tokenizer if (self.artefact.path / TOKENIZER).is_file() else None

    @property
    def positions(self) -> Positions:
        """Rotary embedding and deepstack as config.json declares them."""
        text = self.detection.text
        rope = as_mapping(text.get("rope_parameters") or text.get("rope_scaling"))
        theta, sections = rope.get("rope_theta", text.get("rope_theta")), rope.get("mrope_section")
        return Positions(
            family=self.family,
            hidden_size=dimension(text, "hidden_size"),
            layers=dimension(text, "num_hidden_layers"),
            head_dim=dimension(text, "head_dim", self.family.default_head_dim),
            rope_theta=float(theta) if isinstance(theta, int | float) else None,
            sections=sections if isinstance(sections, list) and all(isinstance(each, int) for each in sections) else (),
            deepstack_layers=len(self.deepstack_layers),
        )

    @property
    def deepstack_layers(self) -> list[int]:
        """The vision layers that feed the decoder's first layers."""
        return layers(self.detection.vision, "deepstack_visual_indexes")

    def classed_tensors(self) -> Iterator[ClassedTensor]:
        """The tensors for the table of classes, under llama.cpp's names."""
        for name, info in self.checkpoint.tensors.items():
            canonical = self.canonical(name)
            is_scale = canonical in self.companions
            weights = 0 if is_scale else prod(info.shape) * (2 if canonical in self.packed else 1)
            kind = "NVFP4" if canonical in self.packed else info.dtype
            yield ClassedTensor(self._gguf_name(canonical), None if is_scale else kind, weights, info.nbytes)

    def _gguf_name(self, canonical: str) -> str:
        if canonical == "score.weight":
            return RANK_HEAD
        try:
            return self.family.gguf_names.of(canonical, self.deepstack_layers) or canonical
        except IndexError:  # a merger that config.json does not have
            return canonical


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object, empty where there is something else."""
    return value if isinstance(value, Mapping) else {}
