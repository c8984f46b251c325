"""What a checkpoint needs in memory, whole and layer by layer, and which of the two is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from qtool.console import human_size
from qtool.errors import SetupError
from qtool.memory import free_memory, resident_memory
from qtool.options import Memory
from qtool.scoring.transformers.prefix import DEFAULT_LIMITS

_SMALLEST_PASS: Final = 1024
"""Padded tokens: with fewer, each layer's weights are fetched from memory for too little work."""

_SLACK: Final = 256 << 20
"""Ids, masks, positions, kernels compiled at the first use, what the allocator keeps: 100 to 200 MB were measured."""

_PICTURES: Final = 500 << 20
"""Decoded pictures that the prompt builder keeps (400 MB), and one picture on its way through the vision tower."""

_SHARE: Final = 0.8
"""Of the free memory, for a run that chooses its budget itself: other programs want some, too."""


@dataclass(frozen=True)
class Footprint:
    """Bytes at the dtype of the computation: all weights, the largest decoder layer, the vision tower.

    `token` is what a layer needs for each padded token while it computes; `process` is what the process held before.
    """

    whole: int
    layer: int
    tower: int
    token: int
    process: int

    @classmethod
    def of(cls, base: Any, dtype: torch.dtype) -> Footprint:
        """The footprint of a base model, of which only the shapes are needed."""
        text = getattr(base, "language_model", base)
        layers, tower = text.layers, getattr(base, "visual", None)
        config, unit = text.config, dtype.itemsize
        queries = config.num_attention_heads * config.head_dim
        # Measured on the 2B shape: see docs/benchmarks.md. The MLP holds three to four tensors of its width at a time.
        token = 4 * (config.intermediate_size + config.hidden_size + queries) * unit
        return cls(
            whole=_numel(base) * unit,
            layer=max(map(_numel, layers)) * unit,
            tower=_numel(tower) * unit if tower is not None else 0,
            token=token,
            process=resident_memory(),
        )

    @property
    def least_layerwise(self) -> int:
        """The smallest budget in which the model runs layer by layer: two layers, and a small pass through one."""
        return self.fixed + _SMALLEST_PASS * self.token

    @property
    def fixed(self) -> int:
        """What a run layer by layer holds whatever it reads; the vision tower is gone before the layers come."""
        pictures = _PICTURES if self.tower else 0
        return self.process + _SLACK + pictures + 2 * self.layer

    @property
    def with_tower(self) -> int:
        """What the process holds while pictures are encoded."""
        return self.process + _SLACK + _PICTURES + self.tower

    def pass_tokens(self, budget: int) -> int:
        """Padded tokens of a pass: half of what the budget leaves goes to the computation, the rest to hidden states."""
        tokens = (budget - self.fixed) // 2 // self.token
        return max(_SMALLEST_PASS, min(DEFAULT_LIMITS.padded_tokens, tokens))


def _numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layerwise_budget(need: Footprint, device: torch.device, memory: Memory) -> int | None:
    """Bytes that a run layer by layer may take; None where the model is to be loaded whole.

    Raises SetupError where the model does not fit even layer by layer.
    """
    if memory != "auto":
        budget = int(memory)
        if budget < need.least_layerwise:
            raise SetupError(
                f"The model does not fit into --memory {human_size(budget)}: "
                f"layer by layer it needs {human_size(need.least_layerwise)}.",
                "Pass a larger --memory, or a smaller --dtype such as bfloat16.",
            )
        return budget
    free = free_memory()
    if free is None or _fits_whole(need, device, free):
        return None
    budget = need.process + int(_SHARE * free)
    if budget < need.least_layerwise:
        raise SetupError(
            f"There is not enough memory: {human_size(free)} are free; the model needs {human_size(need.whole)}, "
            f"or layer by layer {human_size(need.least_layerwise - need.process)}.",
            "Close other programs, or pass a smaller --dtype such as bfloat16.",
        )
    return budget


def _fits_whole(need: Footprint, device: torch.device, free: int) -> bool:
    work = DEFAULT_LIMITS.padded_tokens * need.token + _SLACK + (_PICTURES if need.tower else 0)
    if device.type == "cuda":  # loaded on the CPU, then moved
        return need.whole + _SLACK <= free and need.whole + work <= torch.cuda.mem_get_info(device)[0]
    return need.whole + work <= free
