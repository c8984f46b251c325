"""The two streams of a calibration: all prompts' hidden states, by the original layers and by the quantized ones.

A layer is passed in stages, since each fused group is rounded after the ones before it: what is quantized already has
shaped its input. Every pass is computed by one thread, and sums are taken in the order of the passes, so that the number
of threads changes no bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from qtool.calibration.loops import Sums, new_sums
from qtool.calibration.moments import Moments
from qtool.scoring.transformers.activations import ActivationStore
from qtool.scoring.transformers.prefix import BatchLimits, Continuation, KvPrefix, Pass, padded, padded_tokens
from qtool.workers import WORKERS

if TYPE_CHECKING:
    from qtool.formats.floats import Float32
    from qtool.scoring.transformers.layerwise import LayerwiseModel, Pictures, Weights

T = TypeVar("T")

PASSES: Final = BatchLimits(padded_tokens=2048)
"""Small passes, so that there is work for every thread; fixed, since batches decide the last bit of a hidden state."""

QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT: Final = ("self_attn.o_proj",)
GATE_UP: Final = ("mlp.gate_proj", "mlp.up_proj")
DOWN: Final = ("mlp.down_proj",)
STAGES: Final = (QKV, OUT, GATE_UP, DOWN)
"""The linears of a decoder layer in the order of their inputs; each stage is one fused group."""

Round = Callable[[Sequence[str], Moments], Mapping[str, torch.Tensor]]
"""Given a stage's linears and the moments of their input, the weights that stand for theirs in the quantized stream."""

TokenWeights = Mapping[str, Sequence["Float32"]]
"""How much each token counts, by a stage's first linear, by pass [tokens]."""

_ORIGINAL, _QUANTIZED, _INNER = "original", "quantized", "inner"


class StreamLayer:
    """A decoder layer of one stream. The two linears that end in the residual stream are applied by themselves."""

    def __init__(self, template: Any, weights: Weights) -> None:
        self.module = deepcopy(template)
        self.module.load_state_dict(weights, assign=True)
        self.module.requires_grad_(requires_grad=False)
        self.out, self.module.self_attn.o_proj = self.module.self_attn.o_proj, torch.nn.Identity()
        self.down, self.module.mlp.down_proj = self.module.mlp.down_proj, torch.nn.Identity()

    def linear(self, name: str) -> torch.nn.Module:
        """A linear by its name in the layer."""
        found: torch.nn.Module = {OUT[0]: self.out, DOWN[0]: self.down}.get(name) or self.module.get_submodule(name)
        return found

    def replace(self, linear: str, weight: torch.Tensor) -> None:
        """Put another weight in the place of a linear's."""
        self.linear(linear).weight = torch.nn.Parameter(weight, requires_grad=False)

    def qkv_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the projections of queries, keys and values read."""
        normed: torch.Tensor = self.module.input_layernorm(hidden)
        return normed

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the gate and up projections read."""
        normed: torch.Tensor = self.module.post_attention_layernorm(hidden)
        return normed

    def attention(self, hidden: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
        """What the output projection reads."""
        found: torch.Tensor = self.module.self_attn(hidden_states=self.qkv_input(hidden), **given)[0]
        return found

    def inner(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the down projection reads."""
        found: torch.Tensor = self.module.mlp(self.mlp_input(hidden))
        return found


@dataclass
class Streams:
    """The streams of these passes; `store` holds their hidden states between stages and layers."""

    model: LayerwiseModel
    passes: Sequence[Pass]
    pictures: Pictures
    store: ActivationStore
    pool: Executor

    @property
    def tokens(self) -> int:
        """The number of tokens, each shared prefix once."""
        return sum(len(span) for each in self.passes for span in each.spans)

    def begin(self) -> None:
        """Put the embedded tokens into both streams."""
        for index in self.filled:
            embedded = self.embedded(index)
            self.store[_ORIGINAL, index] = embedded
            self.store[_QUANTIZED, index] = embedded.clone()

    def embedded(self, index: int) -> torch.Tensor:
        """What the first layer reads of a pass: its embedded tokens, with pictures in their places."""
        each = self.passes[index]
        embedded = self.model.embedded(torch.from_numpy(padded([span.ids for span in each.spans])))
        features = self.pictures.features(each.spans, 0)
        return embedded if features is None else embedded.masked_scatter(self.is_picture(each)[..., None], features)

    @property
    def filled(self) -> list[int]:
        """The passes that have tokens."""
        return [index for index, each in enumerate(self.passes) if each.width]

    @property
    def jobs(self) -> list[list[int]]:
        """The passes in the order in which they can be read: the trunk, then each branch with what continues it."""
        jobs: list[list[int]] = []
        for index, each in enumerate(self.passes):
            if each.depth == 2 and jobs:
                jobs[-1].append(index)
            else:
                jobs.append([index])
        return jobs

    def shape(self, index: int) -> torch.Size:
        """The shape of a pass' hidden states."""
        each = self.passes[index]
        return torch.Size((len(each.spans), each.width, self.model.hidden_size))

    def states(self) -> Iterator[tuple[Hashable, torch.Size]]:
        """Where hidden states lie in the store, and their shapes, in a fixed order."""
        for stream in (_ORIGINAL, _QUANTIZED):
            for index in self.filled:
                yield (stream, index), self.shape(index)

    @torch.inference_mode()
    def through(
        self,
        layer: int,
        weights: Weights,
        rounded: Sequence[Sequence[str]],
        round_group: Round,
        token_weights: TokenWeights | None = None,
    ) -> None:
        """Take both streams through a decoder layer, whose stages `rounded` are quantized on the way.

        `token_weights`: how much each token counts, by a stage's first linear and by pass [tokens]; without, all alike.
        """
        original, quantized = (StreamLayer(self.model.layer, weights) for _ in range(2))

        def summed(stage: Sequence[str], *, cross: bool = False) -> _StageSums:
            sums = None
            if stage in rounded:
                shapes = [weights[f"{linear}.weight"].shape for linear in stage]
                drift = 0 if cross else sum(shape[0] for shape in shapes)
                sums = new_sums(shapes[0][1], cross=cross, drift=drift, pool=self.pool, device=self.model.device)
            return _StageSums(sums, token_weights[stage[0]] if token_weights else None)

        def finish(stage: Sequence[str], sums: _StageSums) -> None:
            if sums.sums is not None:
                for linear, weight in round_group(stage, sums.sums.moments()).items():
                    quantized.replace(linear, weight.to(self.model.device))

        sums = summed(QKV, cross=True)
        if sums.sums is not None:
            self._each(partial(self._qkv_inputs, original, quantized), sums)
        finish(QKV, sums)
        sums = summed(OUT)
        self._attention(original, quantized, sums)
        finish(OUT, sums)
        sums = summed(GATE_UP, cross=True)
        self._each(partial(self._mlp_inputs, original, quantized), sums)
        finish(GATE_UP, sums)
        sums = summed(DOWN)
        self._each(partial(self._inner, original, quantized), sums)
        finish(DOWN, sums)
        self._each(partial(self._end, layer, quantized), _StageSums(None, None))

    def _each(self, job: Callable[[int], Found], sums: _StageSums) -> None:
        for found in in_order(self.pool, (partial(job, index) for index in self.filled)):
            sums.add(found)

    # The stages. Each returns what is summed: the input in the quantized stream, and its counterpart or its lack.

    def _qkv_inputs(self, original: StreamLayer, quantized: StreamLayer, index: int) -> Found:
        tokens = self.is_token(index)
        mine = quantized.qkv_input(self.store[_QUANTIZED, index])[tokens]
        return index, mine, original.qkv_input(self.store[_ORIGINAL, index])[tokens], None

    def _attention(self, original: StreamLayer, quantized: StreamLayer, sums: _StageSums) -> None:
        """Prefixes first: what continues the same branch is one job, and the trunk is before all."""
        first, *jobs = self.jobs
        trunk = [KvPrefix.empty(self.model.device)], [KvPrefix.empty(self.model.device)]
        for each in self._attended(first, original, quantized, trunk):
            sums.add(each)
        branches = (partial(self._attended, job, original, quantized, (trunk[0][:2], trunk[1][:2])) for job in jobs)
        for found in in_order(self.pool, branches):
            for each in found:
                sums.add(each)

    def _attended(
        self,
        indices: Sequence[int],
        original: StreamLayer,
        quantized: StreamLayer,
        prefixes: tuple[list[KvPrefix], list[KvPrefix]],
    ) -> list[Found]:
        found: list[Found] = []
        for index in indices:
            each = self.passes[index]
            if not each.width:
                for known in prefixes:
                    known.append(known[each.depth].select(torch.tensor(each.parents, device=self.model.device)))
                continue
            x, xhat = self.store[_ORIGINAL, index], self.store[_QUANTIZED, index]
            mine = self.continued(each, quantized, xhat, prefixes[1])
            after = x + original.out(self.continued(each, original, x, prefixes[0]))
            self.store[_ORIGINAL, index] = after
            self.store[_INNER, index] = mine
            tokens = self.is_token(index)
            found.append((index, mine[tokens], None, (after - (xhat + original.out(mine)))[tokens]))
        return found

    def continued(self, each: Pass, layer: StreamLayer, hidden: torch.Tensor, prefixes: list[KvPrefix]) -> torch.Tensor:
        """What a layer's output projection reads of a pass; a pass that others continue is appended to `prefixes`."""
        device = self.model.device
        cache = Continuation(prefixes[each.depth], torch.tensor(each.parents, device=device), keep=not each.prompts)
        is_token = torch.from_numpy(padded_tokens(each.spans)).to(device)
        positions = torch.from_numpy(padded([span.positions for span in each.spans])).to(device)
        given = {
            "attention_mask": cache.mask(is_token),
            "past_key_values": cache,
            "position_embeddings": self.model.rotary(hidden, positions),
        }
        found = layer.attention(hidden, given)
        if not each.prompts:
            del prefixes[each.depth + 1 :]
            prefixes.append(cache.extended(is_token))
        return found

    def _mlp_inputs(self, original: StreamLayer, quantized: StreamLayer, index: int) -> Found:
        tokens = self.is_token(index)
        after = self.store[_QUANTIZED, index] + quantized.out(self.store[_INNER, index])
        self.store[_QUANTIZED, index] = after
        wanted = original.mlp_input(self.store[_ORIGINAL, index])[tokens]
        return index, quantized.mlp_input(after)[tokens], wanted, None

    def _inner(self, original: StreamLayer, quantized: StreamLayer, index: int) -> Found:
        tokens = self.is_token(index)
        x, xhat = self.store[_ORIGINAL, index], self.store[_QUANTIZED, index]
        after, mine = x + original.down(original.inner(x)), quantized.inner(xhat)
        self.store[_ORIGINAL, index] = after
        self.store[_INNER, f"mlp {index}"] = mine
        return index, mine[tokens], None, (after - (xhat + original.down(mine)))[tokens]

    def _end(self, layer: int, quantized: StreamLayer, index: int) -> Found:
        each = self.passes[index]
        after = self.store[_QUANTIZED, index] + quantized.down(self.store[_INNER, f"mlp {index}"])
        features = self.pictures.features(each.spans, layer + 1)
        if features is not None:
            is_picture, original = self.is_picture(each), self.store[_ORIGINAL, index].clone()
            after[is_picture] += features
            original[is_picture] += features
            self.store[_ORIGINAL, index] = original
        self.store[_QUANTIZED, index] = after
        return None

    def is_token(self, index: int) -> torch.Tensor:
        """Which positions [rows, width] of a pass are tokens, and not padding."""
        return torch.from_numpy(padded_tokens(self.passes[index].spans)).to(self.model.device)

    def is_picture(self, each: Pass) -> torch.Tensor:
        """Which positions [rows, width] of a pass are of pictures."""
        return torch.from_numpy(padded([span.is_picture for span in each.spans])).to(self.model.device)


Found = tuple[int, torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None
"""The pass, and of its tokens the inputs, and their counterpart or their lack."""


@dataclass(frozen=True)
class _StageSums:
    """The sums of a stage that is rounded, and how much each token counts, by pass."""

    sums: Sums | None
    token_weights: Sequence[Float32] | None

    def add(self, found: Found) -> None:
        if self.sums is not None and found is not None:
            index, inputs, wanted, lack = found
            self.sums.add(inputs, wanted, lack, None if self.token_weights is None else self.token_weights[index])


def in_order(
    pool: Executor,
    jobs: Iterable[Callable[[], T]],
    mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode,
) -> Iterator[T]:
    """The results of jobs in their order; some jobs are ahead, each on one thread, in a `mode` of torch."""
    running: deque[Future[T]] = deque()
    try:
        for job in jobs:
            running.append(pool.submit(_alone, job, mode))
            if len(running) > WORKERS + 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for each in running:
            each.cancel()


def _alone(job: Callable[[], T], mode: Callable[[], AbstractContextManager[object]]) -> T:
    torch.set_num_threads(1)
    with mode():  # each thread has its own
        return job()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """No threads of torch's own: work is divided among passes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
