"""One forward pass: prompts in, the hidden state of each one's last token out.

Rule: padding and batch mates never show in the result; positions are computed from the attention mask, explicitly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qtool.arch.prompts import IMAGE_PAD
from qtool.errors import ModelError

if TYPE_CHECKING:
    from qtool.scoring.model import LoadedModel
    from qtool.scoring.prompt import Prompt
    from qtool.scoring.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Forward:
    """The base model on its device; `image_token` is None where the model reads text only."""

    base: Any
    device: torch.device
    image_token: int | None

    @classmethod
    def of(cls, loaded: LoadedModel, tokenizer: PromptTokenizer, device: torch.device) -> Forward:
        """Move the model to `device` and check that config and tokenizer agree on the picture token."""
        image_token: int | None = getattr(loaded.config, "image_token_id", None)
        if image_token is not None and image_token != (own := tokenizer.token_id(IMAGE_PAD)):
            raise ModelError(f"config.json: image_token_id is {image_token}, the tokenizer's {IMAGE_PAD} is {own}.")
        return cls(loaded.base.to(device), device, image_token)

    @torch.inference_mode()
    def last_hidden(self, prompts: Sequence[Prompt], *, pad_left: bool) -> torch.Tensor:
        """Final normed hidden states [n, hidden] at the last token; prompts have pictures all, or none of them."""
        ids, mask = self._padded(prompts, pad_left=pad_left)
        if self.image_token is None:
            inputs = {"position_ids": _places(mask)}
        else:
            inputs = self._vision_inputs(prompts, ids, mask, self.image_token)
        hidden = self.base(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).last_hidden_state
        last = mask.cumsum(dim=-1).argmax(dim=-1)  # the first place at which the count of real tokens is complete
        rows: torch.Tensor = hidden[torch.arange(len(prompts), device=self.device), last]
        return rows

    def _padded(self, prompts: Sequence[Prompt], *, pad_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(prompt.token_ids) for prompt in prompts)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            length = len(prompt.token_ids)
            where = slice(width - length, None) if pad_left else slice(length)
            ids[row, where] = prompt.token_ids
            mask[row, where] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def _vision_inputs(
        self, prompts: Sequence[Prompt], ids: torch.Tensor, mask: torch.Tensor, image_token: int
    ) -> dict[str, torch.Tensor]:
        pictures = [picture for prompt in prompts for picture in prompt.pictures]
        if not pictures:
            # A text may spell out a picture token; without pictures it is an ordinary token at an ordinary place.
            return {"position_ids": _places(mask).expand(3, -1, -1)}
        pixels = torch.from_numpy(np.concatenate([picture.pixel_values for picture in pictures])).to(self.device)
        grid = torch.tensor([picture.grid_thw for picture in pictures], device=self.device)
        is_picture = ids.eq(image_token).int()
        positions, _ = self.base.get_rope_index(ids, is_picture, image_grid_thw=grid, attention_mask=mask)
        return {"position_ids": positions, "pixel_values": pixels, "image_grid_thw": grid}


def _places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)
