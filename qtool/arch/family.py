"""What is known of one model family by name: its tensors, prompts, published sizes, and what other programs call it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtool.arch.gguf_names import GgufNames
from qtool.arch.prompts import PromptSpec
from qtool.arch.spec import Architecture, Config, Task, TensorSpec


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """The rotary embedding that the published sizes were trained with.

    `default_theta` is the base that transformers takes where config.json has none; `sections` are the frequencies given
    to time, height and width, empty for models that read text only.
    """

    theta: float
    default_theta: float
    sections: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """The family's BPE tokenizer: llama.cpp's names for the model and its pre-tokenizer, and the pattern they stand for.

    `classes` are those of transformers that split text so: the family's own, and those that take tokenizer.json as it is.
    """

    gguf_model: str
    gguf_pre: str
    split_pattern: str
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VisionSpec:
    """A vision tower: its tensors, how their names begin, the patch embedding, and llama.cpp's type of the projector.

    `processor` is the class of transformers that puts pictures into prompts.
    """

    tensors: Callable[[Config], Iterator[TensorSpec]]
    prefix: str
    patch_embedding: str
    deepstack_layers: int
    projector_type: str
    processor: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    `key` is its name in code and options, `name` the publisher's. `decoder` gives the decoder's tensors for a text config
    and a prefix. `sizes` are the published ones by hidden size and number of layers. `model_class` and `config_class`
    are the headless model's in transformers; `vllm_overrides` make vLLM rank with the checkpoint of a causal model.
    `ignored_scales` matches the NVFP4 global scales that llama.cpp does not apply (see `families.SEEN_IN`).
    """

    key: str
    name: str
    gguf_architecture: str
    architectures: tuple[Architecture, ...]
    decoder: Callable[[Config, str], Iterator[TensorSpec]]
    gguf_names: GgufNames
    reranker: PromptSpec
    embedder: PromptSpec
    rope: RopeSpec
    default_head_dim: int
    tokenizer: TokenizerSpec
    model_class: str
    config_class: str
    vision: VisionSpec | None = None
    sizes: Mapping[tuple[int, int], str] = field(default_factory=dict)
    vllm_overrides: Mapping[str, Any] = field(default_factory=dict)
    ignored_scales: re.Pattern[str] | None = None

    @property
    def is_vision(self) -> bool:
        """Whether its models see pictures."""
        return self.vision is not None

    def prompt(self, task: Task) -> PromptSpec:
        """The prompt that the publisher scores or embeds with."""
        return self.reranker if task is Task.RERANK else self.embedder

    def size(self, hidden_size: int, layers: int) -> str:
        """The published size with these dimensions, such as "2B"; empty where there is none."""
        return self.sizes.get((hidden_size, layers), "")

    def is_vision_tensor(self, hf_name: str) -> bool:
        """Whether a tensor belongs to the vision tower, which GGUF keeps in a file of its own."""
        return self.vision is not None and hf_name.startswith(self.vision.prefix)

    def scales_ignored_among(self, gguf_names: Iterable[str]) -> list[str]:
        """The names of NVFP4 global scales without which llama.cpp computes."""
        return [name for name in gguf_names if self.ignored_scales and self.ignored_scales.fullmatch(name)]
