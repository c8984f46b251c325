"""Which tokens and which outputs of a linear the answer depends on: its gradient, layer by layer from the last to the first.

The hidden states before each layer are kept by a forward pass. Then each layer is computed again with its graph, pass by
pass: first the ends of the prompts, then the prefixes that they continue, whose keys and values collect gradients from all of
them. Sums have a fixed order, so that the number of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from qtool.calibration.loops import new_sums
from qtool.calibration.streams import STAGES, StreamLayer, Streams, in_order
from qtool.progress import ignore
from qtool.scoring.transformers.prefix import KvPrefix

if TYPE_CHECKING:
    from qtool.calibration.loops import Sums
    from qtool.calibration.workfolder import WorkFolder
    from qtool.formats.floats import Float32
    from qtool.scoring.transformers.activations import ActivationStore
    from qtool.scoring.transformers.layerwise import Weights

Answer = Callable[[torch.Tensor], torch.Tensor]
"""From the last tokens' hidden states [n, hidden] the answers: log-odds [n], or unit vectors [n, d]."""

LINEARS: Final = tuple(linear for stage in STAGES for linear in stage)
_BACKWARD: Final = "backward"
_PULLED: Final = "pulled"


@dataclass(frozen=True)
class LayerGradients:
    """Of one layer: `squares` by a stage's first linear and by pass [tokens], of the gradient by the stage's outputs.

    `covariances`: by linear the mean over tokens of g gᵀ [out, out], g the gradient by the linear's output.
    """

    squares: Mapping[str, Sequence[Float32]]
    covariances: Mapping[str, Float32]


EVERY_TOKEN: Final = 0.1
"""The share of the weights that all tokens have alike.

Without it the last layer would be fitted to the last tokens of the prompts alone. On the demo reranker's panels the error
over that of `max` was 0.130 without it, 0.116 with a tenth, 0.127 with three tenths (one run each). A prefix counts for all
prompts that share it; counted once instead, the first of these was 0.141.
"""


def token_weights(squares: Sequence[Float32], alike: float = EVERY_TOKEN) -> list[Float32]:
    """How much each token counts, mean 1: by its squared gradient, and by the share `alike` as much as any."""
    mean = np.concatenate(squares).mean(dtype=np.float64)
    if not mean:
        return [np.ones_like(each) for each in squares]
    return [((1 - alike) / mean * each + alike).astype(np.float32) for each in squares]


def signed(answers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The sum of answers [n] or [n, d] with random signs: the expectation of its squared gradient is the sum of theirs."""
    signs = torch.randint(0, 2, answers.shape, generator=generator).mul(2).sub(1)
    return (answers * signs.to(answers.device)).sum()


@dataclass
class GradientPass:
    """The gradients of the answers of `streams`' prompts; `store` has the hidden states before every layer.

    An interrupted pass goes on at the layer that it was in, after another forward pass.
    """

    streams: Streams
    store: ActivationStore
    answer: Answer

    def run(self, folder: WorkFolder, advance: Callable[[int, bool], object] = ignore) -> None:
        """Put the gradients of all layers into `folder`; `advance` is called before each layer, forward or not."""
        model = self.streams.model
        left = folder.layers_without_gradients(model.layers)
        if not left:
            return
        self.forward(left, advance)
        if left == model.layers:
            self.begin(left)
        else:
            folder.load_states(_BACKWARD, left, self.store, self._states())
        order = range(left - 1, -1, -1)
        layers = model.layer_weights(order)
        for layer in order:
            advance(layer, False)
            found = self.through(layer, next(layers))
            folder.save_states(_BACKWARD, layer, self.store, self._states())
            folder.save_gradients(layer, found)
        folder.forget_states(_BACKWARD)

    def _states(self) -> Iterator[tuple[Any, torch.Size]]:
        for index in self.streams.filled:
            yield (_BACKWARD, index), self.streams.shape(index)

    # Forward: what goes into each layer.

    @torch.inference_mode()
    def forward(self, layers: int, advance: Callable[[int, bool], object] = ignore) -> None:
        """Keep what goes into the first `layers` layers, and what comes out of the last of them."""
        model, streams = self.streams.model, self.streams
        for index in streams.filled:
            self.store[0, index] = streams.embedded(index)
        weights = model.layer_weights(range(layers))
        for layer in range(layers):
            advance(layer, True)
            module = StreamLayer(model.layer, next(weights))
            first, *jobs = streams.jobs
            trunk = self._read_job(layer, module, first, [KvPrefix.empty(model.device)])
            for _ in in_order(streams.pool, (partial(self._read_job, layer, module, job, trunk[:2]) for job in jobs)):
                pass

    def _read_job(
        self, layer: int, module: StreamLayer, indices: Sequence[int], prefixes: list[KvPrefix]
    ) -> list[KvPrefix]:
        streams = self.streams
        prefixes = list(prefixes)
        for index in indices:
            each = streams.passes[index]
            if not each.width:
                rows = torch.tensor(each.parents, device=streams.model.device)
                prefixes.append(prefixes[each.depth].select(rows))
                continue
            after = _output(streams, module, index, self.store[layer, index], prefixes)
            features = streams.pictures.features(each.spans, layer + 1)
            if features is not None:
                after[streams.is_picture(each)] += features
            self.store[layer + 1, index] = after
        return prefixes

    # Backward: from the answers to the outputs of every linear.

    def first_layer(self, weights: Weights) -> LayerGradients:
        """What the gradients of the first layer would be, were it the only one: for an estimate."""
        self.forward(1)
        self.begin(1)
        return self.through(0, weights)

    def begin(self, layers: int) -> None:
        """Put the gradients by the last layer's output, `layers` of them deep, into the store."""
        streams, model = self.streams, self.streams.model
        generator = torch.Generator().manual_seed(0)
        for index in streams.filled:
            each = streams.passes[index]
            gradient = torch.zeros(streams.shape(index), device=model.device)
            if each.prompts:
                rows, ends = range(len(each.spans)), [len(span) - 1 for span in each.spans]
                with torch.enable_grad():
                    hidden = self.store[layers, index][rows, ends].clone().requires_grad_()
                    (pulled,) = torch.autograd.grad(signed(self.answer(model.normed(hidden)), generator), hidden)
                gradient[rows, ends] = pulled
            self.store[_BACKWARD, index] = gradient

    def through(self, layer: int, weights: Weights) -> LayerGradients:
        """Take the gradients through a layer, from its output to its input."""
        streams = self.streams
        empty = KvPrefix.empty(streams.model.device)
        found = _Found({stage[0]: {} for stage in STAGES}, self._sums(weights))
        (first,), *branches = streams.jobs
        trunk = self._read(layer, weights, first, empty)
        known = _leaf(trunk.prefix)

        def ends() -> Iterator[Callable[[], tuple[int, _Pulled]]]:
            for branch, *leaves in branches:
                with torch.no_grad():
                    prefix = _leaf(self._read(layer, weights, branch, known).prefix)
                for leaf in leaves:
                    yield partial(self._end, layer, weights, branch, leaf, prefix)

        collected: set[int] = set()
        for branch, pulled in in_order(streams.pool, ends(), torch.enable_grad):
            self._take(found, pulled)
            for number, part in enumerate(pulled.prefix):
                key = (_PULLED, branch, number)
                self.store[key] = self.store[key] + part if branch in collected else part
            collected.add(branch)
        total: list[torch.Tensor] = []
        jobs = (partial(self._branch, layer, weights, branch, known) for branch, *_ in branches)
        for pulled in in_order(streams.pool, jobs, torch.enable_grad):
            self._take(found, pulled)
            total = [a + b for a, b in zip(total, pulled.prefix, strict=True)] if total else pulled.prefix
        self._take(found, self._pull(trunk, empty, total))
        squares = {name: [each[index] for index in streams.filled] for name, each in found.squares.items()}
        return LayerGradients(
            {name: _by_pass(streams, arrays) for name, arrays in squares.items()},
            {linear: sums.moments().hessian.astype(np.float32) for linear, sums in found.sums.items()},
        )

    def _sums(self, weights: Weights) -> dict[str, Sums]:
        streams = self.streams
        return {
            linear: new_sums(len(weights[f"{linear}.weight"]), pool=streams.pool, device=streams.model.device)
            for linear in LINEARS
        }

    def _end(self, layer: int, weights: Weights, branch: int, leaf: int, prefix: KvPrefix) -> tuple[int, _Pulled]:
        return branch, self._pull(self._read(layer, weights, leaf, prefix), prefix, [])

    def _branch(self, layer: int, weights: Weights, branch: int, known: KvPrefix) -> _Pulled:
        read = self._read(layer, weights, branch, known)
        pulled = [self.store[_PULLED, branch, number] for number in range(len(_tensors(read.prefix)))]
        return self._pull(read, known, pulled)

    def _read(self, layer: int, weights: Weights, index: int, known: KvPrefix) -> _Read:
        """A pass through the layer, with its graph; `known` is the prefix that it continues."""
        streams = self.streams
        each = streams.passes[index]
        if not each.width:
            rows = torch.tensor(each.parents, device=streams.model.device)
            return _Read(index, known.select(rows))
        module = StreamLayer(streams.model.layer, weights)
        outputs: dict[str, torch.Tensor] = {}

        def watch(linear: str) -> Callable[[Any, Any, torch.Tensor], None]:
            return lambda _module, _inputs, output: outputs.update({linear: output})

        for linear in LINEARS:
            module.linear(linear).register_forward_hook(watch(linear))
        hidden = self.store[layer, index].clone().requires_grad_(torch.is_grad_enabled())
        prefixes = [known] * (each.depth + 1)
        output = _output(streams, module, index, hidden, prefixes)
        return _Read(index, prefixes[-1], hidden, output, outputs)

    def _pull(self, read: _Read, known: KvPrefix, pulled: Sequence[torch.Tensor]) -> _Pulled:
        """The gradients of a pass, whose own prefix collected `pulled`, by what it read and by its linears' outputs."""
        wanted = [*_tensors(read.prefix)] if pulled else []
        gradients = list(pulled)
        inputs = _tensors(known)
        if read.hidden is not None:
            wanted.append(read.output)
            gradients.append(self.store[_BACKWARD, read.index].clone())
            inputs = [*inputs, read.hidden, *read.linears.values()]
        if not wanted or not inputs:
            return _Pulled(read.index, [], None, {})
        found = torch.autograd.grad(wanted, inputs, gradients)
        count = len(_tensors(known))
        if read.hidden is None:
            return _Pulled(read.index, list(found), None, {})
        tokens = self.streams.is_token(read.index)
        linears = {linear: each[tokens] for linear, each in zip(read.linears, found[count + 1 :], strict=True)}
        return _Pulled(read.index, list(found[:count]), found[count], linears)

    def _take(self, found: _Found, pulled: _Pulled) -> None:
        if pulled.hidden is None:
            return
        self.store[_BACKWARD, pulled.index] = pulled.hidden
        for stage in STAGES:
            squares = sum(pulled.linears[linear].square().sum(dim=1) for linear in stage)
            found.squares[stage[0]][pulled.index] = squares.cpu().numpy()  # type: ignore[union-attr]
        for linear, gradient in pulled.linears.items():
            found.sums[linear].add(gradient)


@dataclass
class _Found:
    """What a layer's gradients come to so far; `squares` by pass."""

    squares: dict[str, dict[int, Float32]]
    sums: dict[str, Sums]


@dataclass(frozen=True)
class _Read:
    """A pass through a layer: what it read, what came out, its linears' outputs. Without tokens only a prefix."""

    index: int
    prefix: KvPrefix
    hidden: torch.Tensor | None = None
    output: Any = None
    linears: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Pulled:
    """Gradients by the keys and values that a pass continued, by its hidden states, and of its tokens by linears' outputs."""

    index: int
    prefix: list[torch.Tensor]
    hidden: torch.Tensor | None
    linears: dict[str, torch.Tensor]


def _output(
    streams: Streams, module: StreamLayer, index: int, hidden: torch.Tensor, prefixes: list[KvPrefix]
) -> torch.Tensor:
    """What comes out of a layer, but for what pictures add."""
    after = hidden + module.out(streams.continued(streams.passes[index], module, hidden, prefixes))
    found: torch.Tensor = after + module.down(module.inner(after))
    return found


def _tensors(prefix: KvPrefix) -> list[torch.Tensor]:
    return [tensor for pair in prefix.layers for tensor in pair]


def _leaf(prefix: KvPrefix) -> KvPrefix:
    """The same prefix, at which graphs end."""
    layers = tuple((keys.detach().requires_grad_(), values.detach().requires_grad_()) for keys, values in prefix.layers)
    return KvPrefix(prefix.is_token, layers)


def _by_pass(streams: Streams, arrays: Sequence[Float32]) -> list[Float32]:
    """Arrays of the passes that have tokens as those of all passes."""
    found = iter(arrays)
    return [next(found) if each.width else np.zeros(0, np.float32) for each in streams.passes]
