"""Forward passes that show what goes into linear layers, each token once however many prompts share it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import override

from qtool.scoring.prompt import Prompt
from qtool.scoring.transformers.prefix import (
    DEFAULT_LIMITS,
    BatchLimits,
    Continuation,
    Forward,
    PromptSpan,
    SharedReader,
    padded,
    windows,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.inputs.pictures import PatchedImage

Observe = Callable[[str, torch.Tensor], None]
"""Called with the name under which a linear was asked for, and inputs [tokens, in] that it had not been called with."""


class SeenPrefixes:
    """Which beginnings of prompts have been seen: a token counts when everything before it is new with it."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int | bytes], int] = {}

    def new(self, span: PromptSpan) -> NDArray[np.bool_]:
        """For each token [n] of a whole prompt whether it was not seen after the same tokens and pictures; now it was."""
        is_new = np.zeros(len(span), dtype=np.bool_)
        pictures = iter(span.pictures)
        node, left = 0, 0  # tokens that remain of a picture
        for place, (token, is_picture) in enumerate(zip(span.ids.tolist(), span.is_picture.tolist(), strict=True)):
            key: int | bytes = token
            if is_picture and not left:
                picture = next(pictures)
                key, left = _digest(picture), picture.placeholder_tokens
            left -= is_picture
            is_new[place] = (node, key) not in self._children
            node = self._children.setdefault((node, key), len(self._children) + 1)
        return is_new


def _digest(picture: PatchedImage) -> bytes:
    return hashlib.sha256(f"{picture.grid_thw}".encode() + picture.pixel_values.tobytes()).digest()


@dataclass
class TokenCounts:
    """Distinct tokens that were read: of texts, prompts included, and of pictures."""

    text: int = 0
    pictures: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.text + self.pictures


@dataclass(frozen=True)
class ObservedSpan(PromptSpan):
    """A span that knows which of its tokens [n] count."""

    is_new: NDArray[np.bool_]

    @override
    def part(self, start: int, end: int | None = None) -> ObservedSpan:
        cut = super().part(start, end)
        return ObservedSpan(cut.ids, cut.positions, cut.is_picture, cut.pictures, self.is_new[start:end])


@dataclass(frozen=True)
class ObservedForward(Forward):
    """The forward pass of a loaded model, with `observe` called for the linears `modules`: names by path in `base`."""

    modules: Mapping[str, str]
    observe: Observe
    seen: SeenPrefixes = field(default_factory=SeenPrefixes)
    counts: TokenCounts = field(default_factory=TokenCounts)
    _counted: list[torch.Tensor] = field(default_factory=list)

    @override
    def span(self, prompt: Prompt) -> ObservedSpan:
        whole = super().span(prompt)
        is_new = self.seen.new(whole)
        self.counts.pictures += int((is_new & whole.is_picture).sum())
        self.counts.text += int((is_new & ~whole.is_picture).sum())
        return ObservedSpan(whole.ids, whole.positions, whole.is_picture, whole.pictures, is_new)

    @override
    def _run(self, spans: Sequence[Any], is_token: torch.Tensor, cache: Continuation) -> torch.Tensor:
        self._counted[:] = [torch.from_numpy(padded([span.is_new for span in spans])).to(self.device)]
        return super()._run(spans, is_token, cache)

    def _hook(self, name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def before(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs = arguments[0][self._counted[0]]
            if len(inputs):
                self.observe(name, inputs)

        return before

    def read(
        self, prompts: Iterable[Prompt], done: Callable[[int], None], limits: BatchLimits = DEFAULT_LIMITS
    ) -> None:
        """Run all prompts; `done` is called with the number of prompts that have been read since it was called last."""
        with ExitStack() as stack:
            for path, name in self.modules.items():
                handle = self.base.get_submodule(path).register_forward_pre_hook(self._hook(name))
                stack.callback(handle.remove)
            for window in windows(prompts, limits.window_tokens):
                for batch, _ in SharedReader(self, limits).last_hidden(window):
                    done(len(batch))
