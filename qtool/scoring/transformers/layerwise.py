"""A forward pass whose memory does not grow with the model: a window of prompts goes through one decoder layer at a time.

Two layers' weights are in memory, the one at work and the next, which is read meanwhile. Hidden states of all passes wait
between layers; keys and values of a shared prefix are needed within one layer only. The vision tower is there while the
window's pictures are encoded, each once, and gone before the first layer comes.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.func import functional_call
from typing_extensions import override

from qtool.console import human_size
from qtool.errors import SetupError
from qtool.scoring.prompt import Prompt
from qtool.scoring.transformers.activations import ActivationStore
from qtool.scoring.transformers.footprint import Footprint
from qtool.scoring.transformers.model import StoredWeights, base_name, input_embedding, without_progress_bar
from qtool.scoring.transformers.prefix import (
    BatchLimits,
    Continuation,
    KvPrefix,
    Pass,
    PromptReader,
    PromptSpan,
    padded,
    padded_tokens,
    plan_passes,
    windows,
)

if TYPE_CHECKING:
    from qtool.arch.detect import Detection
    from qtool.inputs.pictures import PatchedImage

Weights = dict[str, torch.Tensor]
_VISUAL: Final = "visual."


# The model: shapes of everything, weights of what is at work.


class LayerwiseModel:
    """A checkpoint's base model, of which only what is at work is in memory."""

    def __init__(
        self,
        base: Any,
        detection: Detection,
        weights: StoredWeights,
        picture_tokens: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`base` is empty: on the device `meta`."""
        self.picture_tokens = picture_tokens
        self.footprint = Footprint.of(base, dtype)
        self.dtype = dtype
        self.device = device
        self._base = base
        self._text = base.language_model if self.picture_tokens else base
        self._weights = weights
        self._names = {base_name(detection, hf_name): hf_name for hf_name in weights.shapes}
        self._prefix = next(name for name, module in base.named_modules() if module is self._text)
        self._text.rotary_emb = type(self._text.rotary_emb)(self._text.config).to(device)

    @property
    def layers(self) -> int:
        """The number of decoder layers."""
        return len(self._text.layers)

    def span(self, prompt: Prompt) -> PromptSpan:
        """The whole prompt."""
        return PromptSpan.whole(prompt, self.picture_tokens)

    @property
    def hidden_size(self) -> int:
        """The width of a hidden state."""
        return int(self._text.config.hidden_size)

    @property
    def layer(self) -> Any:
        """A decoder layer without weights; all layers have its shapes."""
        return self._text.layers[0]

    def layer_names(self, index: int) -> Mapping[str, str]:
        """The hf_name of each weight of a decoder layer, by its name within the layer."""
        return self._under(f"layers.{index}.")

    def layer_weights(self, order: Sequence[int] | None = None) -> Iterator[Weights]:
        """The weights of decoder layers, by default of all; the next layer is read while the caller works with one."""
        with ThreadPoolExecutor(1) as pool:
            ahead: deque[Future[Weights]] = deque()
            for index in range(self.layers) if order is None else order:
                ahead.append(pool.submit(self._read, self.layer_names(index)))
                if len(ahead) == 2:
                    yield ahead.popleft().result()
            if ahead:
                yield ahead.popleft().result()

    def read_layer(self, index: int) -> Weights:
        """The weights of one decoder layer."""
        return self._read(self.layer_names(index))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last layer's norm."""
        normed: torch.Tensor = functional_call(self._text.norm, self._norm, (hidden,))
        return normed

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding for these ids; no other row is read."""
        distinct, places = torch.unique(ids, return_inverse=True)
        rows = self._weights.rows(input_embedding(self._weights), distinct.tolist())
        return torch.from_numpy(rows).to(self.device, self.dtype)[places.to(self.device)]

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """The rotary embedding of positions [rows, 3, width]."""
        return self._text.rotary_emb(hidden, positions.transpose(0, 1) if self.picture_tokens else positions[:, 0])

    def load_tower(self) -> None:
        """Read the vision tower."""
        names = {name.removeprefix(_VISUAL): hf for name, hf in self._names.items() if name.startswith(_VISUAL)}
        tower, state = type(self._base.visual), self._read(names)
        with without_progress_bar():
            config = self._base.config.vision_config
            self._base.visual = tower.from_pretrained(None, config=config, state_dict=state, dtype=self.dtype)
        self._base.visual.eval().to(self.device)

    def free_tower(self) -> None:
        """Forget the vision tower's weights."""
        if self.picture_tokens:
            self._base.visual = self._base.visual.to("meta")

    @torch.inference_mode()
    def picture_features(self, pictures: Sequence[PatchedImage]) -> list[Sequence[torch.Tensor]]:
        """What each picture is among the embedded tokens [n, hidden], and then what is added to it after the first layers."""
        pixels = torch.from_numpy(np.concatenate([picture.pixel_values for picture in pictures])).to(self.device)
        grid = torch.tensor([picture.grid_thw for picture in pictures], device=self.device)
        encoded = self._base.get_image_features(pixels, grid, return_dict=True)
        sizes = [picture.placeholder_tokens for picture in pictures]
        return [encoded.pooler_output, *(features.split(sizes) for features in encoded.deepstack_features)]

    def _under(self, place: str) -> Mapping[str, str]:
        """The hf_names of the text model's weights under `place`, by what follows it."""
        start = f"{self._prefix}.{place}" if self._prefix else place
        return {name.removeprefix(start): hf for name, hf in self._names.items() if name.startswith(start)}

    @cached_property
    def _norm(self) -> Weights:
        return self._read(self._under("norm."))

    def _read(self, names: Mapping[str, str]) -> Weights:
        return {
            name: torch.from_numpy(self._weights.read(hf_name)).to(self.device, self.dtype)
            for name, hf_name in names.items()
        }


# Pictures: encoded as the prompts of a window come in, so that no window holds the pixels of all its pictures.


_PATCHES: Final = 4096
"""What goes through the vision tower together: one large picture, or some small ones (6 kB of pixels a patch)."""


@dataclass
class Pictures:
    """The features of a window's pictures, each encoded once; without `encodes` their tokens are those of the text."""

    model: LayerwiseModel
    store: ActivationStore
    budget: int
    encodes: bool = True
    _is_loaded: bool = False
    _light: dict[int, tuple[weakref.ref[PatchedImage], PatchedImage]] = field(default_factory=dict)
    _waiting: dict[Hashable, PatchedImage] = field(default_factory=dict)

    def registered(self, prompt: Prompt) -> Prompt:
        """`prompt` with pictures that have no pixels; the features of each will be stored."""
        return replace(prompt, pictures=tuple(map(self._registered, prompt.pictures)))

    def _registered(self, picture: PatchedImage) -> PatchedImage:
        known = self._light.get(id(picture))
        if known is not None and known[0]() is picture:
            return known[1]
        light = _without_pixels(picture)
        self._light[id(picture)] = (weakref.ref(picture), light)
        if self.encodes and (_key(light), 0) not in self.store and _key(light) not in self._waiting:
            self._waiting[_key(light)] = picture
            if sum(len(waiting.pixel_values) for waiting in self._waiting.values()) >= _PATCHES:
                self._encode()
        return light

    def _encode(self) -> None:
        if not self._is_loaded:
            self._load()
        found = self.model.picture_features(list(self._waiting.values()))
        for level, features in enumerate(found):
            for key, each in zip(self._waiting, features, strict=True):
                self.store[key, level] = each
        self._waiting.clear()

    def _load(self) -> None:
        need = self.model.footprint.with_tower
        if need > self.budget:
            raise SetupError(
                f"The vision tower does not fit into {human_size(self.budget)} of memory: it needs {human_size(need)}.",
                "Pass a larger --memory, or a smaller --dtype such as bfloat16.",
            )
        self.model.load_tower()
        self._is_loaded = True

    def finish(self) -> None:
        """Encode what is waiting and free the vision tower; the features stay."""
        if self._waiting:
            self._encode()
        if self._is_loaded:
            self.model.free_tower()
            self._is_loaded = False

    def features(self, spans: Sequence[PromptSpan], level: int) -> torch.Tensor | None:
        """The features [n, hidden] of all picture tokens of the spans; None where there are none, or no such level."""
        keys = [(_key(picture), level) for span in spans for picture in span.pictures]
        if not keys or keys[0] not in self.store:
            return None
        return torch.cat([self.store[key] for key in keys])


def _without_pixels(picture: PatchedImage) -> PatchedImage:
    """The picture with a hash of its pixels instead of them: equal pictures stay equal."""
    digest = hashlib.blake2b(picture.pixel_values.data).digest()
    return replace(picture, pixel_values=np.frombuffer(digest, np.uint8).astype(np.float32))


def _key(light: PatchedImage) -> tuple[bytes, tuple[int, int, int]]:
    return light.pixel_values.tobytes(), light.grid_thw


# Reading: the passes of a window, all through the first layer, then all through the second.


class LayerwiseReader(PromptReader):
    """Reads windows of prompts layer by layer within `budget` bytes of memory."""

    def __init__(self, model: LayerwiseModel, limits: BatchLimits, budget: int) -> None:
        self.model = model
        self._limits = replace(limits, padded_tokens=min(limits.padded_tokens, model.footprint.pass_tokens(budget)))
        self._budget = budget
        self._pictures: Pictures

    @override
    def windows(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        source = iter(prompts)
        while True:
            with ActivationStore(self._left(self._limits.padded_tokens), self.model.device) as store:
                self._pictures = Pictures(self.model, store, self._budget)
                window = next(windows(map(self._pictures.registered, source), self._limits.window_tokens), None)
                self._pictures.finish()
                if window is None:
                    return
                yield window

    @torch.inference_mode()
    @override
    def last_hidden(self, window: Sequence[Prompt]) -> Iterator[tuple[list[int], torch.Tensor]]:
        spans = [self.model.span(prompt) for prompt in window]
        passes = list(plan_passes(window, spans, self._limits))
        store = self._pictures.store
        store.limit(self._left(max(each.padded_tokens for each in passes)))
        for index, each in enumerate(passes):
            if each.width:
                store[index] = self._embedded(each)
        layers = self.model.layer_weights()
        for layer in range(self.model.layers):
            weights = next(layers)
            is_last = layer == self.model.layers - 1
            prefixes = [KvPrefix.empty(self.model.device)]
            for index, each in enumerate(passes):
                del prefixes[each.depth + 1 :]
                if not each.width:
                    prefixes.append(prefixes[-1].select(torch.tensor(each.parents, device=self.model.device)))
                    continue
                hidden = self._through(layer, weights, each, store[index], prefixes)
                if not is_last:
                    store[index] = hidden
                elif each.prompts:
                    ends = hidden[range(len(each.spans)), [len(span) - 1 for span in each.spans]]
                    yield list(each.prompts), self.model.normed(ends)
            del weights  # before the next layer comes and the one after it is read

    def _left(self, padded_tokens: int) -> int:
        """Bytes for hidden states beside passes of that size. Raises SetupError where the passes alone are too large."""
        need = self.model.footprint.fixed + padded_tokens * self.model.footprint.token
        if need > self._budget:
            raise SetupError(
                f"A prompt of {padded_tokens:,} tokens does not fit into {human_size(self._budget)} of memory: "
                f"it needs {human_size(need)}.",
                "Pass a larger --memory, or a smaller --dtype such as bfloat16.",
            )
        return self._budget - need

    def _embedded(self, each: Pass) -> torch.Tensor:
        embeds = self.model.embedded(torch.from_numpy(padded([span.ids for span in each.spans])))
        features = self._pictures.features(each.spans, 0)
        return embeds if features is None else embeds.masked_scatter(self._is_picture(each)[..., None], features)

    def _through(
        self, layer: int, weights: Weights, each: Pass, hidden: torch.Tensor, prefixes: list[KvPrefix]
    ) -> torch.Tensor:
        """The hidden states of a pass after a layer; a pass that others continue is appended to `prefixes`."""
        device = self.model.device
        cache = Continuation(prefixes[-1], torch.tensor(each.parents, device=device), keep=not each.prompts)
        is_token = torch.from_numpy(padded_tokens(each.spans)).to(device)
        positions = torch.from_numpy(padded([span.positions for span in each.spans])).to(device)
        given = {
            "attention_mask": cache.mask(is_token),
            "past_key_values": cache,
            "position_embeddings": self.model.rotary(hidden, positions),
        }
        after: torch.Tensor = functional_call(self.model.layer, weights, (hidden,), given)
        if not each.prompts:
            prefixes.append(cache.extended(is_token))
        features = self._pictures.features(each.spans, layer + 1)
        if features is not None:
            after[self._is_picture(each)] += features
        return after

    def _is_picture(self, each: Pass) -> torch.Tensor:
        return torch.from_numpy(padded([span.is_picture for span in each.spans])).to(self.model.device)
