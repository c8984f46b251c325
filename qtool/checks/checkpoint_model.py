"""A safetensors checkpoint of a known family: its tensors by what its architecture calls them.

Rule: a packed weight and its scales go together under the weight's canonical name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import prod
from typing import Any, Final

from qtool.arch.detect import Detection
from qtool.arch.families import QWEN3, QWEN3_VL, Family, Positions
from qtool.arch.gguf_names import RANK_HEAD, gguf_name_of
from qtool.arch.spec import TensorSpec, dimension, section
from qtool.checks.findings import Finding, finding
from qtool.checks.report import StoredTensor
from qtool.errors import ModelError
from qtool.jsonfile import read_json
from qtool.storage.checkpoint import Checkpoint, TensorInfo

_MOST_MISSING: Final = 10_000
"""A config.json that promises many more tensors than there are is not listed to its end."""
TOKENIZER: Final = "tokenizer.json"
PACKED: Final = "U8"
BLOCK_SCALE: Final = ".weight_scale"
GLOBAL_SCALE: Final = ".weight_scale_2"
INPUT_SCALE: Final = ".input_scale"
_WEIGHT: Final = ".weight"


@dataclass(frozen=True)
class CheckpointModel:
    """A checkpoint, what it declares, and the names of all its files."""

    checkpoint: Checkpoint
    detection: Detection
    target: str
    names: Sequence[str]

    def found(self, code: str, **facts: Any) -> Finding:
        """A finding about this checkpoint."""
        return finding(code, self.target, maker="quantize", **facts)

    @property
    def family(self) -> Family:
        """The family of the architecture."""
        return QWEN3_VL if self.detection.architecture.is_vision else QWEN3

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor that the architecture may have."""
        _ = self.deepstack_layers  # refuses what the architecture would stumble over
        declared = self.detection.architecture.tensors(self.detection.config)
        return {spec.hf_name: spec for spec in islice(declared, len(self.checkpoint.tensors) + _MOST_MISSING)}

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
        return hf_name.removesuffix(suffix) + _WEIGHT if suffix else ""

    @cached_property
    def tokenizer(self) -> Mapping[str, Any] | None:
        """tokenizer.json where it lies on this disk: over the network its 11 MB would be most of what is fetched."""
        path = self.checkpoint.directory / TOKENIZER
        return read_json(path) if path.is_file() else None

    @property
    def positions(self) -> Positions:
        """Rotary embedding and deepstack as config.json declares them."""
        config = self.detection.config
        text = section(config, "text_config") if self.family.is_vision else config
        rope = as_mapping(text.get("rope_parameters") or text.get("rope_scaling"))
        theta, sections = rope.get("rope_theta", text.get("rope_theta")), rope.get("mrope_section")
        norm = next(spec for name, spec in self.specs.items() if name.endswith("q_norm.weight"))
        return Positions(
            self.family, dimension(text, "hidden_size"), dimension(text, "num_hidden_layers"), norm.shape[0],
            float(theta) if isinstance(theta, int | float) else None,
            sections if isinstance(sections, list) and all(isinstance(each, int) for each in sections) else (),
            len(self.deepstack_layers),
        )  # fmt: skip

    @property
    def deepstack_layers(self) -> Sequence[int]:
        """The vision layers that feed the decoder's first layers."""
        vision = section(self.detection.config, "vision_config") if self.family.is_vision else {}
        layers = vision.get("deepstack_visual_indexes", [])
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise ModelError(f"config.json: deepstack_visual_indexes is {layers!r}, not a list of layers.")
        return layers

    def stored_tensors(self) -> Iterator[StoredTensor]:
        """The tensors for the table of classes, under llama.cpp's names."""
        for name, info in self.checkpoint.tensors.items():
            canonical = self.canonical(name)
            is_scale = canonical in self.companions
            weights = 0 if is_scale else prod(info.shape) * (2 if canonical in self.packed else 1)
            kind = "NVFP4" if canonical in self.packed else info.dtype
            yield StoredTensor(
                _gguf_name(canonical, self.deepstack_layers), None if is_scale else kind, weights, info.nbytes
            )


def _gguf_name(canonical: str, deepstack: Sequence[int]) -> str:
    if canonical == "score.weight":
        return RANK_HEAD
    try:
        return gguf_name_of(canonical, deepstack) or canonical
    except IndexError:  # a merger that config.json does not have
        return canonical


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object, empty where there is something else."""
    return value if isinstance(value, Mapping) else {}
