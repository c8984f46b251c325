"""Forward passes in which prompts that begin alike are read once as far as they agree."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from qtool.arch.prompts import IMAGE_PAD, VIDEO_PAD
from qtool.errors import ModelError
from qtool.inputs.items import OFFICIAL_LIMITS
from qtool.scoring.prompt import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.inputs.pictures import PatchedImage
    from qtool.scoring.tokenizer import PromptTokenizer
    from qtool.scoring.transformers.model import LoadedModel

# Which prompts run through the model together. A batch changes the speed and never the score.


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on memory: padded ids in one forward pass, prompts in one, and ids (with their pixels) held at a time."""

    padded_tokens: int = 8192
    prompts: int = 64
    window_tokens: int = 32_768


DEFAULT_LIMITS: Final = BatchLimits()


def windows(prompts: Iterable[Prompt], tokens: int) -> Iterator[list[Prompt]]:
    """Runs of prompts that are held at a time; `prompts` is read lazily."""
    window: list[Prompt] = []
    held = 0
    for prompt in prompts:
        window.append(prompt)
        held += len(prompt.token_ids)
        if held >= tokens:
            yield window
            window, held = [], 0
    if window:
        yield window


def packed(lengths: Sequence[int], limits: BatchLimits) -> Iterator[list[int]]:
    """Batches of places in `lengths`, like lengths together."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Lengths ascend, so the newcomer sets the padded width of the batch.
        if batch and (len(batch) == limits.prompts or (len(batch) + 1) * lengths[place] > limits.padded_tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


# Parts of prompts: the ids that one forward pass reads, each with its place and picture (or pair of video frames). A
# part keeps the positions that it has in the whole prompt, and no picture is ever cut in two.


@dataclass(frozen=True)
class PromptSpan:
    """Consecutive ids [n] of a prompt, their positions [3, n] (time, row, column), and which are picture tokens [n]."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    is_picture: NDArray[np.bool_]
    pictures: tuple[PatchedImage, ...]

    @classmethod
    def whole(cls, prompt: Prompt, picture_tokens: Sequence[int]) -> PromptSpan:
        """All of `prompt`; without pictures, a picture token that its text spells out is an ordinary one."""
        ids = np.array(prompt.token_ids, dtype=np.int64)
        is_picture = np.isin(ids, picture_tokens) if prompt.pictures else np.zeros(len(ids), dtype=np.bool_)
        grids = [picture.grid_thw for picture in prompt.pictures]
        return cls(ids, rope_positions(is_picture, grids), is_picture, prompt.pictures)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, end: int | None = None) -> PromptSpan:
        """The ids from `start` to `end`, where a picture lies wholly inside or wholly outside."""
        first, last = self._pictures_before(start), self._pictures_before(len(self) if end is None else end)
        here = slice(start, end)
        return PromptSpan(self.ids[here], self.positions[:, here], self.is_picture[here], self.pictures[first:last])

    def _pictures_before(self, end: int) -> int:
        return int(np.searchsorted(_picture_ends(self.pictures), np.count_nonzero(self.is_picture[:end]), "right"))


def rope_positions(is_picture: NDArray[np.bool_], grids: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """M-RoPE positions [3, n] as transformers' `get_rope_index` gives them; of a text all three are its places."""
    positions = np.empty((3, len(is_picture)), dtype=np.int64)
    done, place = 0, 0
    for frames, rows, columns in grids:
        start = done + int(is_picture[done:].argmax())
        positions[:, done:start] = np.arange(place, place + start - done)
        cells = np.indices((frames, rows // OFFICIAL_LIMITS.merge, columns // OFFICIAL_LIMITS.merge)).reshape(3, -1)
        place += start - done
        done = start + cells.shape[1]
        positions[:, start:done] = place + cells
        place += max(rows, columns) // OFFICIAL_LIMITS.merge
    positions[:, done:] = np.arange(place, place + len(is_picture) - done)
    return positions


def shared_length(spans: Sequence[PromptSpan]) -> int:
    """How many first ids, with the same pictures under them, all prompts have in common; each keeps one of its own."""
    if len(spans) == 1:
        return 0
    first = spans[0]
    length = min(len(span) for span in spans) - 1
    for span in spans[1:]:
        differs = (first.ids[:length] != span.ids[:length]) | (first.is_picture[:length] != span.is_picture[:length])
        length = int(differs.argmax()) if differs.any() else length
    return _whole_pictures(first, length, min(_common_pictures(first, span) for span in spans[1:]))


def _common_pictures(one: PromptSpan, other: PromptSpan) -> int:
    for count, (mine, theirs) in enumerate(zip(one.pictures, other.pictures, strict=False)):
        if not _are_equal(mine, theirs):
            return count
    return min(len(one.pictures), len(other.pictures))


def _are_equal(one: PatchedImage, other: PatchedImage) -> bool:
    # A picture in memory is made ready anew for each prompt, so equal ones need not be the same object. The patches of
    # blank pictures are equal whatever their shapes, and what a prompt reads is not: positions follow the shape.
    return one is other or (one.grid_thw == other.grid_thw and np.array_equal(one.pixel_values, other.pixel_values))


def _whole_pictures(span: PromptSpan, length: int, common: int) -> int:
    places = np.flatnonzero(span.is_picture[:length])
    ends = _picture_ends(span.pictures[:common])
    kept = int(ends[ends <= len(places)].max(initial=0))
    return length if kept == len(places) else int(places[kept])


def _picture_ends(pictures: Sequence[PatchedImage]) -> NDArray[np.int64]:
    return np.cumsum([picture.placeholder_tokens for picture in pictures], dtype=np.int64)


# What the model has read already: keys and values of each layer, from which several prompts go on. A memory is never
# changed; reading further gives a new one, or, for the last part of a prompt, none.


@dataclass(frozen=True)
class KvPrefix:
    """Keys and values [rows, heads, width, dim] of each layer, and which of the places hold a real token [rows, width]."""

    seen: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @classmethod
    def empty(cls, device: torch.device) -> KvPrefix:
        """Nothing read, in one row."""
        return cls(torch.zeros(1, 0, dtype=torch.bool, device=device))

    @property
    def width(self) -> int:
        """The places of a row, padding included."""
        return int(self.seen.shape[1])

    def select(self, rows: torch.Tensor) -> KvPrefix:
        """A memory of these rows, each as often as it is named."""
        return KvPrefix(self.seen[rows], tuple((keys[rows], values[rows]) for keys, values in self.layers))


@dataclass
class Continuation:
    """The cache that a forward pass sees: each of its rows goes on from a row of `memory`.

    It has the one method that attention layers call. transformers' own caches would keep the last parts of prompts too.
    """

    memory: KvPrefix
    parents: torch.Tensor
    keep: bool
    _layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from the prompt's start on."""
        if self.memory.layers:
            known_keys, known_values = self.memory.layers[layer]
            keys = torch.cat([known_keys[self.parents], keys], dim=2)
            values = torch.cat([known_values[self.parents], values], dim=2)
        if self.keep:
            self._layers.append((keys, values))
        return keys, values

    def mask(self, real: torch.Tensor) -> torch.Tensor:
        """[rows, 1, width, memory + width]: what each place may look at, given the real places of this pass."""
        width = real.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
        # Padding sees itself: where nothing came before, an empty row of the softmax would be NaN.
        own = causal & (real[:, None] | torch.eye(width, dtype=torch.bool, device=real.device))
        known = self.memory.seen[self.parents][:, None].expand(-1, width, -1)
        return torch.cat([known, own], dim=2)[:, None]

    def grown(self, real: torch.Tensor) -> KvPrefix:
        """The memory with what this pass has read."""
        return KvPrefix(torch.cat([self.memory.seen[self.parents], real], dim=1), tuple(self._layers))


# Forward passes: parts of prompts in, the hidden state of each one's last token or a memory of all out. Padding,
# batch mates and where a prompt is parted never show in the result; each distinct picture of a pass is encoded once.


@dataclass(frozen=True)
class Forward:
    """The base model on its device; `picture_tokens` (image, video) are none where the model reads text only."""

    base: Any
    device: torch.device
    picture_tokens: tuple[int, ...]

    @classmethod
    def of(cls, loaded: LoadedModel, tokenizer: PromptTokenizer, device: torch.device) -> Forward:
        """Move the model to `device` and check that config and tokenizer agree on the picture tokens."""
        picture_tokens = tuple(_picture_tokens(loaded.config, tokenizer))
        if getattr(loaded.base, "has_sliding_layers", False):
            raise ModelError(
                "config.json asks for sliding window attention, which no published model of the family has."
            )
        return cls(loaded.base.to(device), device, picture_tokens)

    @property
    def nothing_read(self) -> KvPrefix:
        """Where the first part of a prompt goes on from."""
        return KvPrefix.empty(self.device)

    def span(self, prompt: Prompt) -> PromptSpan:
        """The whole prompt, ready to be parted."""
        return PromptSpan.whole(prompt, self.picture_tokens)

    @torch.inference_mode()
    def remember(self, spans: Sequence[PromptSpan], parents: Sequence[int], memory: KvPrefix) -> KvPrefix:
        """A memory with a row for each span, which goes on from the row of `memory` that `parents` names."""
        rows = self._tensor(parents)
        if not any(len(span) for span in spans):
            return memory.select(rows)
        cache = Continuation(memory, rows, keep=True)
        real = self._real(spans)
        self._read(spans, real, cache)
        return cache.grown(real)

    @torch.inference_mode()
    def last_hidden(self, spans: Sequence[PromptSpan], parents: Sequence[int], memory: KvPrefix) -> torch.Tensor:
        """Final normed hidden states [n, hidden] at the last token; the spans are as in `remember`, and not empty."""
        cache = Continuation(memory, self._tensor(parents), keep=False)
        hidden = self._read(spans, self._real(spans), cache)
        rows: torch.Tensor = hidden[range(len(spans)), [len(span) - 1 for span in spans]]
        return rows

    def _read(self, spans: Sequence[PromptSpan], real: torch.Tensor, cache: Continuation) -> torch.Tensor:
        ids = self._padded([span.ids for span in spans])
        positions = self._padded([span.positions for span in spans])
        text = self.base.language_model if self.picture_tokens else self.base
        hidden: torch.Tensor = text(
            position_ids=positions.transpose(0, 1) if self.picture_tokens else positions[:, 0],
            attention_mask=cache.mask(real),
            past_key_values=cache,
            use_cache=False,
            **self._embedded(spans, text.get_input_embeddings()(ids)),
        ).last_hidden_state
        return hidden

    def _embedded(self, spans: Sequence[PromptSpan], embeds: torch.Tensor) -> dict[str, Any]:
        pictures = {id(picture): picture for span in spans for picture in span.pictures}
        if not pictures:
            return {"inputs_embeds": embeds}
        pixels = torch.from_numpy(np.concatenate([picture.pixel_values for picture in pictures.values()]))
        grid = self._tensor([picture.grid_thw for picture in pictures.values()])
        seen = self.base.get_image_features(pixels.to(self.device), grid, return_dict=True)
        rows = self._tensor(_feature_rows(spans))
        where = self._padded([span.is_picture for span in spans])
        return {
            "inputs_embeds": embeds.masked_scatter(where[..., None], torch.cat(seen.pooler_output)[rows]),
            "visual_pos_masks": where,
            "deepstack_visual_embeds": [features[rows] for features in seen.deepstack_features],
        }

    def _real(self, spans: Sequence[PromptSpan]) -> torch.Tensor:
        return self._padded([np.ones(len(span), dtype=np.bool_) for span in spans])

    def _padded(self, arrays: Sequence[NDArray[Any]]) -> torch.Tensor:
        width = max(array.shape[-1] for array in arrays)
        padded = np.zeros((len(arrays), *arrays[0].shape[:-1], width), dtype=arrays[0].dtype)
        for row, array in zip(padded, arrays, strict=True):
            row[..., : array.shape[-1]] = array
        return torch.from_numpy(padded).to(self.device)

    def _tensor(self, numbers: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)


def _picture_tokens(config: Any, tokenizer: PromptTokenizer) -> Iterator[int]:
    for key, token in (("image_token_id", IMAGE_PAD), ("video_token_id", VIDEO_PAD)):
        declared: int | None = getattr(config, key, None)
        if declared is not None:
            if declared != (own := tokenizer.token_id(token)):
                raise ModelError(f"config.json: {key} is {declared}, the tokenizer's {token} is {own}.")
            yield declared


def _feature_rows(spans: Sequence[PromptSpan]) -> list[int]:
    """For each picture token of the spans, its row among the features of the distinct pictures."""
    starts: dict[int, int] = {}
    rows: list[int] = []
    encoded = 0
    for picture in (picture for span in spans for picture in span.pictures):
        if id(picture) not in starts:
            starts[id(picture)] = encoded
            encoded += picture.placeholder_tokens
        start = starts[id(picture)]
        rows.extend(range(start, start + picture.placeholder_tokens))
    return rows


# Prompts that begin alike are read once as far as they agree: the trunk of all, then a branch for each query. What is
# shared is found in the ids themselves; a prompt's `group` says where to look and never what is there.


@dataclass(frozen=True)
class _Branch:
    """What a group's prompts share ends at `end`; `leaves` are their places in the window."""

    end: int
    leaves: tuple[int, ...]


@dataclass(frozen=True)
class SharedReader:
    """Reads windows of prompts."""

    forward: Forward
    limits: BatchLimits

    def last_hidden(self, window: Sequence[Prompt]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Batch by batch the places of prompts in the window, and the hidden states [n, hidden] of their last tokens."""
        spans = [self.forward.span(prompt) for prompt in window]
        trunk = shared_length(spans)
        memory = self.forward.remember([spans[0].part(0, trunk)], [0], self.forward.nothing_read)
        branches = _branches(window, spans, trunk)
        for batch in packed([branch.end for branch in branches], self.limits):
            chosen = [branches[place] for place in batch]
            yield from self._leaves(spans, chosen, self._remember(spans, chosen, trunk, memory))

    def _remember(
        self, spans: Sequence[PromptSpan], branches: Sequence[_Branch], trunk: int, memory: KvPrefix
    ) -> KvPrefix:
        parts = [spans[branch.leaves[0]].part(trunk, branch.end) for branch in branches]
        return self.forward.remember(parts, [0] * len(parts), memory)

    def _leaves(
        self, spans: Sequence[PromptSpan], branches: Sequence[_Branch], memory: KvPrefix
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        places = [(row, leaf) for row, branch in enumerate(branches) for leaf in branch.leaves]
        parts = [spans[leaf].part(branches[row].end) for row, leaf in places]
        for batch in packed([memory.width + len(part) for part in parts], self.limits):
            rows, leaves = zip(*(places[index] for index in batch), strict=True)
            yield list(leaves), self.forward.last_hidden([parts[index] for index in batch], rows, memory)


def _branches(window: Sequence[Prompt], spans: Sequence[PromptSpan], trunk: int) -> list[_Branch]:
    groups: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(window):
        groups.setdefault(prompt.group, []).append(place)
    return [
        _Branch(max(trunk, shared_length([spans[place] for place in places])), tuple(places))
        for places in groups.values()
    ]
