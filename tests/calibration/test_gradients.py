"""The gradients that are found layer by layer, against autograd through the whole model, prompt by prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.arch.spec import Task
from qtool.calibration.gradients import LINEARS, GradientPass, LayerGradients, token_weights
from qtool.calibration.moments import single_threaded_blas
from qtool.calibration.streams import STAGES, Streams, one_thread_each
from qtool.calibration.workfolder import WorkFolder
from qtool.scoring.transformers.activations import ActivationStore
from qtool.scoring.transformers.layerwise import Pictures
from qtool.scoring.transformers.prefix import BatchLimits, Continuation, KvPrefix, PromptSpan, plan_passes
from qtool.scoring.transformers.runtime import ScorerOptions, TransformersScorer, open_scorer
from qtool.workers import worker_pool
from tests.scoring import tiny
from tests.scoring.test_shared import PAIRS, TEXT_PAIRS

CPU = torch.device("cpu")
LIMITS = BatchLimits(padded_tokens=600)
"""Small passes: several of them, side by side."""


@dataclass
class Case:
    """A scorer, what it is asked, and the passes that read it."""

    scorer: TransformersScorer
    prompts: list[Any]

    @property
    def spans(self) -> list[PromptSpan]:
        """The prompts as the model reads them."""
        return [self.scorer.loaded.reader.forward.span(prompt) for prompt in self.prompts]

    @property
    def passes(self) -> list[Any]:
        """How the prompts are read."""
        return list(plan_passes(self.prompts, self.spans, LIMITS))


@pytest.fixture(scope="module", params=["vision reranker", "vision embedder", "text reranker", "no shared prefix"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("models") / "model"
    made = tiny.write_vl(folder) if "vision" in request.param else tiny.write_text(folder)
    task = Task.EMBED if "embedder" in request.param else Task.RERANK
    scorer = open_scorer(made, ScorerOptions(task, device="cpu"))
    pairs = PAIRS if "vision" in request.param else TEXT_PAIRS
    if task is Task.EMBED:
        return Case(scorer, [scorer.prompt(pair.document) for pair in pairs])
    return Case(scorer, [scorer.prompt(pair) for pair in (pairs[:1] if "no shared" in request.param else pairs)])


def layerwise(case: Case, folder: Path, fails_at: int | None = None) -> list[LayerGradients]:
    """By layer, from a pass that is interrupted before a layer, if asked for, and taken up again."""
    folder.mkdir(exist_ok=True)
    work, model = WorkFolder(folder), case.scorer.layers()
    with ActivationStore(1 << 30, CPU) as store, worker_pool() as pool, single_threaded_blas(), one_thread_each():
        pictures = Pictures(model, store, 1 << 34)
        prompts = [pictures.registered(prompt) for prompt in case.prompts]
        pictures.finish()
        passes = list(plan_passes(prompts, [model.span(prompt) for prompt in prompts], LIMITS))
        streams = Streams(model, passes, pictures, store, pool)

        def advance(layer: int, is_forward: bool) -> None:  # noqa: FBT001 - a callback
            if layer == fails_at and not is_forward:
                raise KeyboardInterrupt

        GradientPass(streams, store, case.scorer.answer()).run(work, advance)
    tokens = [sum(map(len, each.spans)) for each in passes]
    return [work.gradients(layer, tokens) for layer in range(model.layers)]


def _keep(outputs: dict[Any, torch.Tensor], place: Any, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
    outputs[place] = output


def whole(case: Case) -> list[dict[str, list[np.ndarray]]]:
    """By layer, linear and pass the gradients [rows, width, out], each prompt read alone and in one piece."""
    loaded = case.scorer.loaded
    forward, passes, spans = loaded.reader.forward, case.passes, case.spans
    text = forward.base.language_model if forward.picture_tokens else forward.base
    places = [(layer, linear) for layer in range(len(text.layers)) for linear in LINEARS]
    modules = [text.layers[layer].get_submodule(linear) for layer, linear in places]
    totals = {
        place: [np.zeros((len(each.spans), each.width, module.out_features), np.float32) for each in passes]
        for place, module in zip(places, modules, strict=True)
    }
    generator = torch.Generator().manual_seed(0)
    for number, each in enumerate(passes):
        shape = (len(each.prompts),) if case.scorer.task is Task.RERANK else (len(each.prompts), 64)
        signs = torch.randint(0, 2, shape, generator=generator).mul(2).sub(1) if each.prompts else ()
        for row, (prompt, sign) in enumerate(zip(each.prompts, signs, strict=True)):
            outputs: dict[Any, torch.Tensor] = {}
            handles = [
                module.register_forward_hook(partial(_keep, outputs, place))
                for place, module in zip(places, modules, strict=True)
            ]
            cache = Continuation(KvPrefix.empty(CPU), torch.tensor([0]), keep=False)
            hidden = forward._run([spans[prompt]], forward._is_token([spans[prompt]]), cache)[:, -1]
            found = torch.autograd.grad((loaded.answer(hidden)[0] * sign).sum(), [outputs[place] for place in places])
            for handle in handles:
                handle.remove()
            branch = max(n for n in range(number) if passes[n].depth == 1)
            parent = each.parents[row]
            way = [(0, passes[branch].parents[parent]), (branch, parent), (number, row)]
            for place, gradient in zip(places, found, strict=True):
                start = 0
                for index, line in way:
                    length = len(passes[index].spans[line])
                    totals[place][index][line, :length] += gradient[0, start : start + length].numpy()
                    start += length
    return [{linear: totals[layer, linear] for linear in LINEARS} for layer in range(len(text.layers))]


def test_gradients_are_those_of_the_whole_model(case: Case, tmp_path: Path) -> None:
    found = layerwise(case, tmp_path)
    passes = case.passes
    counted = [[np.arange(each.width) < len(span) for span in each.spans] for each in passes]
    for layer, expected in zip(found, whole(case), strict=True):
        tokens = {
            linear: [each[np.array(mask)] if each.size else each[0] for each, mask in zip(parts, counted, strict=True)]
            for linear, parts in expected.items()
        }
        for stage in STAGES:
            squares = [
                sum((part**2).sum(axis=1) for part in parts)
                for parts in zip(*(tokens[linear] for linear in stage), strict=True)
            ]
            for mine, theirs in zip(layer.squares[stage[0]], squares, strict=True):
                largest = max(float(each.max(initial=0)) for each in squares)
                np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6 * largest)
            for linear in stage:
                rows = np.concatenate(tokens[linear])
                covariance = rows.T @ rows / len(rows)
                largest = np.abs(covariance).max()
                np.testing.assert_allclose(layer.covariances[linear], covariance, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("case", ["vision reranker"], indirect=True)
def test_an_interrupted_pass_goes_on_with_the_same_numbers(case: Case, tmp_path: Path) -> None:
    once = layerwise(case, tmp_path / "once")
    with pytest.raises(KeyboardInterrupt):
        layerwise(case, tmp_path / "again", fails_at=1)
    assert WorkFolder(tmp_path / "again").layers_without_gradients(3) == 2
    for mine, theirs in zip(layerwise(case, tmp_path / "again"), once, strict=True):
        assert set(mine.covariances) == set(LINEARS)
        for linear in LINEARS:
            assert np.array_equal(mine.covariances[linear], theirs.covariances[linear])
        for stage, parts in mine.squares.items():
            assert all(map(np.array_equal, parts, theirs.squares[stage]))
    assert not list((tmp_path / "again").glob("*.bin"))


def test_token_weights_have_the_mean_one() -> None:
    weights = token_weights([np.float32([1, 3]), np.float32([]), np.float32([8])], alike=0.5)
    assert [each.tolist() for each in weights] == [[0.625, 0.875], [], [1.5]]
    assert token_weights([np.zeros(3, np.float32)])[0].tolist() == [1, 1, 1]
