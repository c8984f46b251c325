"""The publisher's way to score a panel: transformers, one pair at a time; a whole process for `make bench`.

Rule: nothing of qtool.scoring. As in the official class the tokenizer and the processor are loaded once, and one row of
w_yes - w_no stands for the vocabulary; `qtool.inputs` only reads the panel's lines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from qtool import resources
from qtool.inputs.builtin import find_panel
from qtool.inputs.items import Item, Pair
from qtool.inputs.panels import load_panel
from qtool.inputs.pictures import load_image
from tests.scoring.official import VL_RERANK, VL_RERANK_INSTRUCTION, load, picture_text


class OfficialLoop:
    """The model with all that the official class holds, on pictures whose sides are multiples of 32."""

    def __init__(self, directory: Path) -> None:
        whole = load(directory)
        self.model = whole.model
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.processor = Qwen2VLImageProcessorPil(
            patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        vocabulary = self.tokenizer.get_vocab()
        self.row = whole.lm_head.weight[vocabulary["yes"]] - whole.lm_head.weight[vocabulary["no"]]

    @torch.no_grad()
    def log_odds(self, pair: Pair) -> float:
        """Of one pair, in one pass of its own."""
        images = [load_image(source) for source in (*pair.query.image, *pair.document.image)]
        instruction = pair.query.instruction or VL_RERANK_INSTRUCTION
        prompt = VL_RERANK.format(instruction=instruction, query=side(pair.query), document=side(pair.document))
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        fed: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            pad = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
            fed |= self.processor(images=images, do_resize=False, return_tensors="pt")
            fed["mm_token_type_ids"] = (ids == pad).int()
        return float(self.model(**fed, use_cache=False).last_hidden_state[0, -1] @ self.row)


def side(item: Item) -> str:
    """A side as the official prompt shows it."""
    return "".join(picture_text(load_image(source)) for source in item.image) + item.joined_text


def main() -> None:
    """MODEL PANEL QUERIES OUTPUT: score the first queries of a panel and write a line for each pair."""
    model, panel, queries, output = sys.argv[1:]
    loop = OfficialLoop(resources.demo_model(model))
    pairs = load_panel(find_panel(panel)).first(int(queries)).pairs
    Path(output).write_text("".join(f"{json.dumps({'log_odds': loop.log_odds(pair)})}\n" for pair in pairs))


if __name__ == "__main__":
    main()
