"""Forward passes that read the common prefix of prompts once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch
from typing_extensions import override

from qtool.arch.prompts import IMAGE_PAD, VIDEO_PAD
from qtool.errors import ModelError
from qtool.inputs.items import OFFICIAL_LIMITS
from qtool.scoring.prompt import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from qtool.inputs.pictures import PatchedImage
    from qtool.scoring.tokenizer import PromptTokenizer

# Batches: which prompts run through the model together.


@dataclass(frozen=True)
class BatchLimits:
    """Bounds on memory: padded ids and prompts in one forward pass, and ids (with their pixels) held at a time."""

    padded_tokens: int = 8192
    prompts: int = 64
    window_tokens: int = 32_768


DEFAULT_LIMITS: Final = BatchLimits()


def windows(prompts: Iterable[Prompt], tokens: int) -> Iterator[list[Prompt]]:
    """Runs of prompts that are held in memory together; `prompts` is read lazily."""
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
    """Batches of indices into `lengths`, similar lengths together."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Lengths ascend, so the last one is the padded width of the batch.
        if batch and (len(batch) == limits.prompts or (len(batch) + 1) * lengths[index] > limits.padded_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


# Spans of prompts. A span keeps the positions that it has in the whole prompt, and never divides a picture.


@dataclass(frozen=True)
class PromptSpan:
    """Consecutive ids [n] of a prompt, their positions [3, n] (time, row, column), and which are picture tokens [n]."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    is_picture: NDArray[np.bool_]
    pictures: tuple[PatchedImage, ...]

    @classmethod
    def whole(cls, prompt: Prompt, picture_tokens: Sequence[int]) -> PromptSpan:
        """All of `prompt`; without pictures, a picture token written in its text is an ordinary token."""
        ids = np.array(prompt.token_ids, dtype=np.int64)
        is_picture = np.isin(ids, picture_tokens) if prompt.pictures else np.zeros(len(ids), dtype=np.bool_)
        grids = [picture.grid_thw for picture in prompt.pictures]
        return cls(ids, rope_positions(is_picture, grids), is_picture, prompt.pictures)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, end: int | None = None) -> PromptSpan:
        """The ids from `start` to `end`; each picture must be entirely inside or outside."""
        first, last = self._pictures_before(start), self._pictures_before(len(self) if end is None else end)
        here = slice(start, end)
        return PromptSpan(self.ids[here], self.positions[:, here], self.is_picture[here], self.pictures[first:last])

    def _pictures_before(self, end: int) -> int:
        return int(np.searchsorted(_picture_ends(self.pictures), np.count_nonzero(self.is_picture[:end]), "right"))


def rope_positions(is_picture: NDArray[np.bool_], grids: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """M-RoPE positions [3, n] as transformers' `get_rope_index` gives them; for text all three rows count tokens."""
    positions = np.empty((3, len(is_picture)), dtype=np.int64)
    done, position = 0, 0
    for frames, rows, columns in grids:
        start = done + int(is_picture[done:].argmax())
        positions[:, done:start] = np.arange(position, position + start - done)
        cells = np.indices((frames, rows // OFFICIAL_LIMITS.merge, columns // OFFICIAL_LIMITS.merge)).reshape(3, -1)
        position += start - done
        done = start + cells.shape[1]
        positions[:, start:done] = position + cells
        position += max(rows, columns) // OFFICIAL_LIMITS.merge
    positions[:, done:] = np.arange(position, position + len(is_picture) - done)
    return positions


def shared_length(spans: Sequence[PromptSpan]) -> int:
    """The length of the common prefix, pictures included; each span keeps at least one id of its own."""
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
    # A picture in memory is prepared again for each prompt, so equal ones need not be the same object. Blank pictures
    # of different shapes may have equal patches, but not equal positions.
    return one is other or (one.grid_thw == other.grid_thw and np.array_equal(one.pixel_values, other.pixel_values))


def _whole_pictures(span: PromptSpan, length: int, common: int) -> int:
    """`length`, or less, so that it ends behind a whole picture and among the first `common` ones."""
    tokens = np.flatnonzero(span.is_picture[:length])
    ends = _picture_ends(span.pictures[:common])
    kept = int(ends[ends <= len(tokens)].max(initial=0))
    return length if kept == len(tokens) else int(tokens[kept])


def _picture_ends(pictures: Sequence[PatchedImage]) -> NDArray[np.int64]:
    return np.cumsum([picture.placeholder_tokens for picture in pictures], dtype=np.int64)


# Keys and values of a prefix. A KvPrefix is immutable: reading further gives a new one, or none for a prompt's last
# span.


@dataclass(frozen=True)
class KvPrefix:
    """Keys and values [rows, heads, width, dim] of each layer, and which positions are not padding [rows, width]."""

    is_token: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @classmethod
    def empty(cls, device: torch.device) -> KvPrefix:
        """The empty prefix, in one row."""
        return cls(torch.zeros(1, 0, dtype=torch.bool, device=device))

    @property
    def width(self) -> int:
        """The positions of a row, padding included."""
        return int(self.is_token.shape[1])

    def select(self, rows: torch.Tensor) -> KvPrefix:
        """These rows, each as often as it is named."""
        return KvPrefix(self.is_token[rows], tuple((keys[rows], values[rows]) for keys, values in self.layers))


@dataclass
class Continuation:
    """The cache of one forward pass, in which each row continues a row of `prefix`.

    It has the one method that attention layers call. transformers' own caches would keep the last spans of prompts too.
    """

    prefix: KvPrefix
    parents: torch.Tensor
    keep: bool
    _layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values from the start of the prompt."""
        if self.prefix.layers:
            known_keys, known_values = self.prefix.layers[layer]
            keys = torch.cat([known_keys[self.parents], keys], dim=2)
            values = torch.cat([known_values[self.parents], values], dim=2)
        if self.keep:
            self._layers.append((keys, values))
        return keys, values

    def mask(self, is_token: torch.Tensor) -> torch.Tensor:
        """The attention mask [rows, 1, width, prefix + width], given which positions of this pass are tokens."""
        width = is_token.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=is_token.device).tril()
        # Padding attends to itself: without a prefix, an empty row of the softmax would be NaN.
        own = causal & (is_token[:, None] | torch.eye(width, dtype=torch.bool, device=is_token.device))
        known = self.prefix.is_token[self.parents][:, None].expand(-1, width, -1)
        return torch.cat([known, own], dim=2)[:, None]

    def extended(self, is_token: torch.Tensor) -> KvPrefix:
        """The prefix with the keys and values of this pass."""
        return KvPrefix(torch.cat([self.prefix.is_token[self.parents], is_token], dim=1), tuple(self._layers))


# Forward passes: spans in, the hidden states of their last tokens or a longer prefix out. Each distinct picture of a
# pass is encoded once.


@dataclass(frozen=True)
class Forward:
    """The base model on its device; `picture_tokens` (image, video) is empty where the model reads text only."""

    base: Any
    device: torch.device
    picture_tokens: tuple[int, ...]

    def span(self, prompt: Prompt) -> PromptSpan:
        """The whole prompt."""
        return PromptSpan.whole(prompt, self.picture_tokens)

    @torch.inference_mode()
    def extend(self, spans: Sequence[PromptSpan], parents: Sequence[int], prefix: KvPrefix) -> KvPrefix:
        """A prefix with a row for each span, which continues the row of `prefix` that `parents` names."""
        rows = self._tensor(parents)
        if not any(len(span) for span in spans):
            return prefix.select(rows)
        cache = Continuation(prefix, rows, keep=True)
        is_token = self._is_token(spans)
        self._run(spans, is_token, cache)
        return cache.extended(is_token)

    @torch.inference_mode()
    def last_hidden(self, spans: Sequence[PromptSpan], parents: Sequence[int], prefix: KvPrefix) -> torch.Tensor:
        """Final normed hidden states [n, hidden] at the last token; the spans are as in `extend`, and not empty."""
        cache = Continuation(prefix, self._tensor(parents), keep=False)
        hidden = self._run(spans, self._is_token(spans), cache)
        rows: torch.Tensor = hidden[range(len(spans)), [len(span) - 1 for span in spans]]
        return rows

    @torch.inference_mode()
    def hidden(self, span: PromptSpan) -> torch.Tensor:
        """Final normed hidden states [tokens, hidden] at every token of one prompt."""
        cache = Continuation(KvPrefix.empty(self.device), self._tensor([0]), keep=False)
        found: torch.Tensor = self._run([span], self._is_token([span]), cache)[0]
        return found

    def _run(self, spans: Sequence[PromptSpan], is_token: torch.Tensor, cache: Continuation) -> torch.Tensor:
        ids = self._tensor(padded([span.ids for span in spans]))
        positions = self._tensor(padded([span.positions for span in spans]))
        text = self.base.language_model if self.picture_tokens else self.base
        hidden: torch.Tensor = text(
            position_ids=positions.transpose(0, 1) if self.picture_tokens else positions[:, 0],
            attention_mask=cache.mask(is_token),
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
        encoded = self.base.get_image_features(pixels.to(self.device), grid, return_dict=True)
        rows = self._tensor(_feature_rows(spans))
        is_picture = self._tensor(padded([span.is_picture for span in spans]))
        return {
            "inputs_embeds": embeds.masked_scatter(is_picture[..., None], torch.cat(encoded.pooler_output)[rows]),
            "visual_pos_masks": is_picture,
            "deepstack_visual_embeds": [features[rows] for features in encoded.deepstack_features],
        }

    def _is_token(self, spans: Sequence[PromptSpan]) -> torch.Tensor:
        return self._tensor(padded_tokens(spans))

    def _tensor(self, numbers: Any) -> torch.Tensor:
        return torch.as_tensor(numbers, device=self.device)


def padded(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The arrays [..., n] as the rows of one, zeros behind the shorter ones."""
    rows = np.zeros((len(arrays), *arrays[0].shape[:-1], max(a.shape[-1] for a in arrays)), dtype=arrays[0].dtype)
    for row, array in zip(rows, arrays, strict=True):
        row[..., : array.shape[-1]] = array
    return rows


def padded_tokens(spans: Sequence[PromptSpan]) -> NDArray[np.bool_]:
    """Which positions [rows, width] of spans side by side are tokens, and not padding."""
    return padded([np.ones(len(span), dtype=np.bool_) for span in spans])


def picture_tokens(base: Any, tokenizer: PromptTokenizer) -> tuple[int, ...]:
    """The tokens that stand for pictures and frames; none of a text model. Raises ModelError for what is not supported."""
    if getattr(base, "has_sliding_layers", False):
        raise ModelError(
            "config.json enables sliding window attention, which is not supported: no published model of the family has it."
        )
    return tuple(_picture_tokens(base.config, tokenizer))


def _picture_tokens(config: Any, tokenizer: PromptTokenizer) -> Iterator[int]:
    for key, token in (("image_token_id", IMAGE_PAD), ("video_token_id", VIDEO_PAD)):
        declared: int | None = getattr(config, key, None)
        if declared is not None:
            if declared != (own := tokenizer.token_id(token)):
                raise ModelError(f"config.json: {key} is {declared}; the tokenizer's {token} is {own}.")
            yield declared


def _feature_rows(spans: Sequence[PromptSpan]) -> list[int]:
    """The row of each picture token of the spans among the features of the distinct pictures."""
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


# Prefix sharing: first the prefix of all prompts (the trunk), then that of each query's (a branch), then the rest of
# each prompt (a leaf). Prefixes are found by comparing ids; a prompt's `group` only says which to compare. What is read
# in which order is planned before anything is: the passes of a window, each of which continues an earlier one.


@dataclass(frozen=True)
class Pass:
    """Spans that are read side by side.

    Each continues a row, named by `parents`, of the last pass before it whose `depth` is one less. `prompts` are the
    indices of the prompts that end here; without any, the spans are prefixes that later passes continue.
    """

    spans: tuple[PromptSpan, ...]
    parents: tuple[int, ...]
    depth: int
    prompts: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """The length of its longest span."""
        return max(map(len, self.spans))

    @property
    def padded_tokens(self) -> int:
        """The positions that are computed, padding included."""
        return len(self.spans) * self.width


def plan_passes(window: Sequence[Prompt], spans: Sequence[PromptSpan], limits: BatchLimits) -> Iterator[Pass]:
    """The passes that read all prompts of a window, whose whole spans are `spans`: each shared prefix once."""
    trunk = shared_length(spans)
    yield Pass((spans[0].part(0, trunk),), (0,), 0)
    branches = _branches(window, spans, trunk)
    for batch in packed([branch.end for branch in branches], limits):
        chosen = [branches[index] for index in batch]
        parts = tuple(spans[branch.leaves[0]].part(trunk, branch.end) for branch in chosen)
        branch = Pass(parts, (0,) * len(parts), 1)
        yield branch
        yield from _leaves(spans, chosen, trunk + branch.width, limits)


def _leaves(
    spans: Sequence[PromptSpan], branches: Sequence[_Branch], known: int, limits: BatchLimits
) -> Iterator[Pass]:
    """The rest of each prompt; `known` is the padded width of what was read before."""
    numbered = [(row, leaf) for row, branch in enumerate(branches) for leaf in branch.leaves]
    parts = [spans[leaf].part(branches[row].end) for row, leaf in numbered]
    for batch in packed([known + len(part) for part in parts], limits):
        rows, leaves = zip(*(numbered[index] for index in batch), strict=True)
        yield Pass(tuple(parts[index] for index in batch), rows, 2, leaves)


@dataclass(frozen=True)
class _Branch:
    """The common prefix of a group ends at `end`; `leaves` are the indices of its prompts in the window."""

    end: int
    leaves: tuple[int, ...]


def _branches(window: Sequence[Prompt], spans: Sequence[PromptSpan], trunk: int) -> list[_Branch]:
    groups: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(window):
        groups.setdefault(prompt.group, []).append(index)
    return [
        _Branch(max(trunk, shared_length([spans[index] for index in members])), tuple(members))
        for members in groups.values()
    ]


class PromptReader(Protocol):
    """Reads prompts, a window of them at a time."""

    def windows(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        """Runs of prompts to be read together; `prompts` is read lazily."""

    def last_hidden(self, window: Sequence[Prompt]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """By batch, the indices of prompts in the window and the hidden states [n, hidden] of their last tokens."""


@dataclass(frozen=True)
class SharedReader(PromptReader):
    """A model in memory: the passes of a window one after the other, each through all layers."""

    forward: Forward
    limits: BatchLimits

    @override
    def windows(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        return windows(prompts, self.limits.window_tokens)

    @override
    def last_hidden(self, window: Sequence[Prompt]) -> Iterator[tuple[list[int], torch.Tensor]]:
        spans = [self.forward.span(prompt) for prompt in window]
        prefixes = [KvPrefix.empty(self.forward.device)]
        for each in plan_passes(window, spans, self.limits):
            del prefixes[each.depth + 1 :]
            if each.prompts:
                yield list(each.prompts), self.forward.last_hidden(each.spans, each.parents, prefixes[-1])
            else:
                prefixes.append(self.forward.extend(each.spans, each.parents, prefixes[-1]))
