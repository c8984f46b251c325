"""The publisher's computation, one pair at a time, by transformers alone; nothing of qtool.scoring is used here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

VL_RERANK = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}'
    "<Query>:{query}\n<Document>:{document}<|im_end|>\n<|im_start|>assistant\n"
)
VL_RERANK_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
TEXT_RERANK = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n'
    "<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
TEXT_RERANK_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
VL_EMBED = "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@cache
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


def ids(directory: Path, text: str) -> tuple[int, ...]:
    """Of a whole prompt."""
    return tuple(tokenizer(directory)(text).input_ids)


def load(directory: Path) -> Any:
    """The whole model with its real lm_head, in fp32."""
    from transformers import AutoConfig

    is_vision = AutoConfig.from_pretrained(directory).model_type == "qwen3_vl"
    model_class = Qwen3VLForConditionalGeneration if is_vision else Qwen3ForCausalLM
    return model_class.from_pretrained(directory, dtype=torch.float32).eval()


def picture_text(image: Image.Image) -> str:
    """The placeholder of a picture whose sides are multiples of 32 and within the limits."""
    return f"<|vision_start|>{'<|image_pad|>' * (image.width * image.height // 1024)}<|vision_end|>"


def film_text(frames: Sequence[Image.Image], seconds: Sequence[str]) -> str:
    """The placeholders of a video, two frames a step, whose frames need no resize.

    The publisher's transformers (4.57) and vLLM put nothing around the steps. Later releases of transformers leave the
    `<|vision_start|>` and `<|vision_end|>` of the chat template there, which the models have not been trained with.
    """
    tokens = "<|video_pad|>" * (frames[0].width * frames[0].height // 1024)
    return "".join(f"<{second} seconds><|vision_start|>{tokens}<|vision_end|>" for second in seconds)


def inputs(
    directory: Path, prompt: str, images: Sequence[Image.Image] = (), videos: Sequence[Sequence[Image.Image]] = ()
) -> dict[str, Any]:
    """What the official code feeds the model; `images` and frames need no resize."""
    words = tokenizer(directory)
    ids = words(prompt, return_tensors="pt").input_ids
    fed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not images and not videos:
        return fed
    image_pad, video_pad = (words.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video"))
    fed["mm_token_type_ids"] = (ids == image_pad).int() + 2 * (ids == video_pad).int()
    if images:
        fed |= _pixels(images)
    if videos:
        films = [_film(frames) for frames in videos]
        fed["pixel_values_videos"] = torch.cat([pixels for pixels, _ in films])
        fed["video_grid_thw"] = torch.stack([grid for _, grid in films])
    return fed


def _pixels(images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return dict(processor(images=list(images), do_resize=False, return_tensors="pt"))


def _film(frames: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and grid: the processor of pictures repeats each frame in time, and of each pair a step takes one of both."""
    patches = [_pixels([frame])["pixel_values"].view(-1, 3, 2, 256) for frame in frames]
    steps = [
        torch.stack([one[:, :, 0], other[:, :, 1]], dim=2).flatten(1)
        for one, other in zip(patches[::2], patches[1::2], strict=True)
    ]
    grid = torch.tensor([len(steps), frames[0].height // 16, frames[0].width // 16])
    return torch.cat(steps), grid


@torch.no_grad()
def log_odds(
    model: Any,
    directory: Path,
    prompt: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
) -> float:
    """log P(yes) - log P(no) from the full logits of the last position."""
    logits = model(**inputs(directory, prompt, images, videos)).logits[0, -1].double()
    vocabulary = tokenizer(directory).get_vocab()
    log_probability = torch.log_softmax(logits, dim=-1)
    return float(log_probability[vocabulary["yes"]] - log_probability[vocabulary["no"]])


@torch.no_grad()
def embedding(
    model: Any,
    directory: Path,
    prompt: str,
    images: Sequence[Image.Image] = (),
    videos: Sequence[Sequence[Image.Image]] = (),
) -> torch.Tensor:
    """The normalised last hidden state."""
    hidden = model.model(**inputs(directory, prompt, images, videos)).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(hidden, dim=-1)
