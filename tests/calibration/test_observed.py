"""What goes into linears: every token once, padding never, and the numbers of a plain forward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qtool.artefact import CheckpointArtefact
from qtool.calibration.collect import Collector, InputGroup, collect, input_groups, passes
from qtool.calibration.data import load_calibration, questions
from qtool.errors import ModelError
from qtool.scoring.prompt import Prompt
from qtool.scoring.transformers.observed import ObservedForward
from qtool.scoring.transformers.prefix import BatchLimits
from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer
from qtool.storage.gguf_model import open_gguf_file
from qtool.storage.hub import resolve

HERE = Path(__file__).parent


class Loaded:
    """A demo model, loaded once."""

    def __init__(self, name):
        self.opened = CheckpointArtefact(resolve(name, None, None))
        self.scorer = open_scorer(self.opened, ScorerOptions())
        self.forward = self.scorer.loaded.reader.forward
        self.groups = input_groups(self.opened.detection)

    def observed(self, take):
        modules = {g.hf_names[0].removeprefix("model.").removesuffix(".weight"): g.module for g in self.groups}
        forward = self.forward
        return ObservedForward(forward.base, forward.device, forward.picture_tokens, modules, take)

    def squares(self, asked, **limits):
        """Sums by group and the tokens, after one pass over the prompts `asked`."""
        collector = Collector(self.groups)
        observed = self.observed(lambda name, x: collector.take(name, x.numpy()))
        run = lambda _groups, _take: observed.read(asked, lambda _done: None, BatchLimits(**limits))  # noqa: E731
        assert list(collect(collector, run, [])) == []
        return collector.squares, observed.counts


@pytest.fixture(scope="module")
def embedder():
    return Loaded("qtool-demo-embedder")


@pytest.fixture(scope="module")
def reranker():
    return Loaded("qtool-demo-reranker")


@pytest.fixture(scope="module")
def prompts(reranker):
    data = load_calibration(["demo-calibration"], limit=6)
    return [reranker.scorer.prompt(question) for question in questions(data, reranker.scorer.task, None)]


def test_the_sums_are_those_of_llama_imatrix(embedder):
    """`llama-imatrix -m F32.gguf -f llama-imatrix.txt -c 64 -b 64 -ub 64 -ctk f32 -ctv f32 -fa off --no-ppl` of the
    llama.cpp that `make engines` fetches wrote the file that this compares with."""
    ids = embedder.scorer._opened.tokenizer.encode((HERE / "llama-imatrix.txt").read_text())
    collector = Collector(embedder.groups)
    collector.begin([])
    for start in range(0, 8 * 64, 64):  # llama.cpp reads chunks, each from position 0; a new pass shares no prefix
        observed = embedder.observed(lambda name, x: collector.take(name, x.numpy()))
        observed.read([Prompt("chunk", tuple(ids[start : start + 64]))], lambda _done: None)
    theirs = open_gguf_file(HERE / "llama-imatrix.gguf")
    compared = set()
    for group in embedder.groups:
        for hf_name in group.hf_names:
            name = embedder.opened.family.gguf_names.of(hf_name)
            sums, counts = (theirs.read(theirs.tensors[name + end]).view("<f4") for end in (".in_sum2", ".counts"))
            ours = collector.squares[group.module]
            assert ours.tokens == counts == 512
            np.testing.assert_allclose(ours.squares, sums, rtol=1e-4)
            compared |= {f"{name}.in_sum2", f"{name}.counts"}
    assert compared == set(theirs.tensors)


def test_each_token_counts_once_and_padding_never(reranker, prompts):
    """Against whole prompts, one by one, of which only what no earlier prompt began with is added up."""
    expected = {group.module: np.zeros(group.columns) for group in reranker.groups}
    tokens, seen = 0, set()
    for prompt in prompts:
        inputs = {}
        observed = reranker.observed(lambda name, x, inputs=inputs: inputs.setdefault(name, []).append(x.numpy()))
        observed.read([prompt], lambda _done: None)
        pictures = [picture.pixel_values.tobytes() for picture in prompt.pictures]
        is_picture = [token in reranker.forward.picture_tokens for token in prompt.token_ids]
        is_new, begun = [], 0
        for place, (before, here) in enumerate(zip([False, *is_picture], is_picture, strict=False)):
            begun += here and not before
            prefix = prompt.token_ids[: place + 1], tuple(pictures[:begun])
            is_new.append(prefix not in seen)
            seen.add(prefix)
        tokens += sum(is_new)
        for name, parts in inputs.items():
            (whole,) = parts
            assert len(whole) == len(prompt.token_ids)
            expected[name] += np.square(whole[is_new]).sum(axis=0, dtype=np.float64)
    found, counts = reranker.squares(prompts)
    assert counts.total == tokens
    assert 0 < counts.pictures < counts.total
    for name, sums in found.items():
        assert sums.tokens == tokens
        np.testing.assert_allclose(sums.squares, expected[name], rtol=1e-4)


@pytest.mark.parametrize("limits", [{"window_tokens": 1}, {"window_tokens": 150}, {"prompts": 1}])
def test_a_prefix_counts_once_across_windows_and_batches(reranker, prompts, limits):
    whole, counts = reranker.squares(prompts)
    cut, cut_counts = reranker.squares(prompts, **limits)
    assert cut_counts == counts
    for name, sums in whole.items():
        assert cut[name].tokens == sums.tokens
        np.testing.assert_allclose(cut[name].squares, sums.squares, rtol=1e-4)


def test_a_repeated_prompt_adds_nothing(reranker, prompts):
    assert reranker.squares([*prompts, *prompts])[1] == reranker.squares(prompts)[1]


def test_hessians_in_little_memory_take_more_passes_and_are_the_same(reranker, prompts):
    def moments(memory):
        collector, ran = Collector(reranker.groups), []

        def run(groups, take):
            ran.append([group.module for group in groups])
            observed = reranker.observed(lambda name, x: take(name, x.numpy()))
            observed.read(prompts, lambda _done: None)

        return dict(collect(collector, run, passes(reranker.groups, memory))), collector, ran

    whole, collector, ran = moments(1 << 30)
    assert len(ran) == 1
    parts, _, ran = moments(3 << 20)  # a down projection needs 2 MiB, another group half of one
    assert len(ran) == 6
    assert ran[0] == [group.module for group in reranker.groups]  # the squares of all
    assert [module for modules in ran[1:] for module in modules] == [group.module for group in reranker.groups[3:]]
    assert list(whole) == list(parts) == [group.module for group in reranker.groups]
    for name, found in whole.items():
        assert found.tokens == collector.squares[name].tokens
        np.testing.assert_array_equal(found.hessian, parts[name].hessian)
        np.testing.assert_allclose(found.hessian.diagonal() * found.tokens, collector.squares[name].squares, rtol=1e-5)


def test_groups_divide_by_memory():
    groups = [InputGroup(str(columns), (), columns) for columns in (2, 2, 4, 2)]
    names = lambda memory: [[group.module for group in part] for part in passes(groups, memory)]  # noqa: E731
    assert names(1000) == [["2", "2", "4", "2"]]
    assert names(64) == [["2", "2"], ["4"], ["2"]]
    assert names(1) == [["2"], ["2"], ["4"], ["2"]]


def test_every_quantized_linear_is_in_one_group(reranker):
    specs = reranker.opened.detection.architecture.tensors(reranker.opened.detection.config)
    quantized = [spec for spec in specs if spec.fused_group]
    assert {name for group in reranker.groups for name in group.hf_names} == {spec.hf_name for spec in quantized}
    assert all(
        spec.shape[1] == group.columns
        for group in reranker.groups
        for spec in quantized
        if spec.hf_name in group.hf_names
    )


def test_inputs_that_are_not_finite_are_named(reranker):
    collector = Collector(reranker.groups[:1])
    run = lambda _groups, take: take(reranker.groups[0].module, np.full((1, 256), np.inf, np.float32))  # noqa: E731
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.qkv_proj are not finite"):
        list(collect(collector, run, []))


def test_the_hooks_are_gone_afterwards(reranker, prompts):
    reranker.squares(prompts[:1])
    assert all(not module._forward_pre_hooks for module in reranker.forward.base.modules())
    assert isinstance(reranker.scorer.loaded.reader.forward.base, torch.nn.Module)
