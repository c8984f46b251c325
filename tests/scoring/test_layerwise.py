"""Layer by layer, a model scores as it does whole, within the memory that it was given."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qtool import api, memory, resources
from qtool.arch.spec import Task
from qtool.errors import SetupError, UsageError
from qtool.inputs.builtin import load_panels
from qtool.inputs.items import Item, Pair
from qtool.scoring.transformers import footprint
from qtool.scoring.transformers.activations import ActivationStore
from qtool.scoring.transformers.footprint import Footprint, layerwise_budget
from qtool.scoring.transformers.layerwise import LayerwiseModel, LayerwiseReader
from qtool.scoring.transformers.model import StoredWeights
from qtool.scoring.transformers.prefix import BatchLimits, SharedReader
from qtool.scoring.transformers.runtime import ScorerOptions, TransformersScorer, open_scorer
from tests.scoring.test_shared import PAIRS, TEXT_PAIRS

GB = 10**9
BUDGET = 16 * GB  # what other tests have loaded into this process counts, too
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in resources.demo_models():
        made[name] = tmp_path_factory.mktemp("quantized") / name
        api.quantize(name, output=made[name], progress=None)
    return made


def answers(scorer: TransformersScorer, panel: str, queries: int) -> np.ndarray:
    (opened,) = load_panels([panel], queries)
    if scorer.task is Task.RERANK:
        return np.array(scorer.score(opened.pairs))
    return scorer.embed([item for query in opened.queries for item in (query.item, *query.documents)])


def both(directory: Path, panel: str) -> tuple[np.ndarray, np.ndarray]:
    """The answers of the whole model, and layer by layer."""
    found = []
    for memory_option, reader in (("auto", SharedReader), (BUDGET, LayerwiseReader)):
        scorer = open_scorer(directory, ScorerOptions(device="cpu", memory=memory_option))
        found.append(answers(scorer, panel, 2))
        assert isinstance(scorer._reader, reader)
    return found[0], found[1]


@pytest.mark.parametrize("panel", ["demo-text", "demo-mixed", "demo-image"])
@pytest.mark.parametrize("name", resources.demo_models())
@pytest.mark.parametrize("kind", ["bf16", "nvfp4"])
def test_a_demo_model_answers_as_it_does_whole(name: str, panel: str, kind: str, quantized: dict[str, Path]) -> None:
    whole, layers = both(quantized[name] if kind == "nvfp4" else resources.demo_model(name), panel)
    np.testing.assert_allclose(layers, whole, rtol=0, atol=1e-5)


def layerwise(directory: Path, **limits: int) -> TransformersScorer:
    return open_scorer(directory, ScorerOptions(Task.RERANK, device="cpu", limits=BatchLimits(**limits), memory=BUDGET))


@pytest.mark.parametrize("window_tokens", [400, 32_768])
def test_prompts_of_all_kinds_in_any_number_of_windows(vl_model: Path, window_tokens: int) -> None:
    whole = open_scorer(vl_model, ScorerOptions(Task.RERANK, device="cpu")).score(PAIRS)
    found = layerwise(vl_model, window_tokens=window_tokens).score(PAIRS)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.005)])
def test_other_dtypes_answer_as_whole_models_of_them_do(dtype: str, tolerance: float, vl_model: Path) -> None:
    options = ScorerOptions(Task.RERANK, dtype, "cpu")
    whole = open_scorer(vl_model, options).score(PAIRS)
    found = open_scorer(vl_model, replace(options, memory=BUDGET)).score(PAIRS)
    np.testing.assert_allclose(found, whole, rtol=0, atol=tolerance)


def test_a_text_model(text_model: Path) -> None:
    whole = open_scorer(text_model, ScorerOptions(Task.RERANK, device="cpu")).score(TEXT_PAIRS)
    np.testing.assert_allclose(layerwise(text_model, prompts=2).score(TEXT_PAIRS), whole, rtol=0, atol=1e-5)


def test_hidden_states_may_all_be_in_the_scratch_file(vl_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = layerwise(vl_model).score(PAIRS)
    monkeypatch.setattr(LayerwiseReader, "_left", lambda *_: 0)
    written: list[int] = []
    write = ActivationStore._write
    monkeypatch.setattr(
        ActivationStore, "_write", lambda me, offset, tensor: written.append(offset) or write(me, offset, tensor)
    )
    assert layerwise(vl_model).score(PAIRS) == expected
    assert len(written) > 10


def test_two_layers_are_in_memory_and_never_the_embedding(vl_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most: list[int] = []
    read_layer, read = LayerwiseModel._read, StoredWeights.read

    def counted(model: LayerwiseModel, names: dict[str, str]) -> dict[str, torch.Tensor]:
        weights = read_layer(model, names)
        if "self_attn.q_proj.weight" in weights:
            alive.append(weakref.ref(weights["self_attn.q_proj.weight"]))
            gc.collect()
            most.append(sum(each() is not None for each in alive))
        return weights

    def refused(weights: StoredWeights, hf_name: str) -> np.ndarray:
        assert "embed_tokens" not in hf_name
        return read(weights, hf_name)

    monkeypatch.setattr(LayerwiseModel, "_read", counted)
    monkeypatch.setattr(StoredWeights, "read", refused)
    layerwise(vl_model).score(PAIRS)
    assert len(most) == 3
    assert max(most) <= 2


def test_each_picture_of_a_window_is_encoded_once_and_the_tower_is_gone_before_the_layers(
    vl_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("load_tower", "free_tower", "layer_weights"):
        real = getattr(LayerwiseModel, name)
        monkeypatch.setattr(LayerwiseModel, name, lambda me, name=name, real=real: events.append(name) or real(me))
    encode, encoded = LayerwiseModel.picture_features, []
    monkeypatch.setattr(
        LayerwiseModel, "picture_features", lambda me, pictures: encoded.extend(pictures) or encode(me, pictures)
    )
    layerwise(vl_model).score(PAIRS)
    distinct = {image.tobytes() for pair in PAIRS for item in (pair.query, pair.document) for image in item.image}
    assert len(encoded) == len(distinct)
    assert events == ["load_tower", "free_tower", "layer_weights"]
    events.clear()
    layerwise(vl_model).score([Pair(Item("q", ("text",)), Item("d", ("only",)))])
    assert events == ["layer_weights"]


def test_a_budget_that_is_too_small_is_refused_before_a_weight_is_read(
    vl_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoredWeights, "read", lambda *_: pytest.fail("a weight was read"))
    scorer = open_scorer(vl_model, ScorerOptions(Task.RERANK, device="cpu", memory=10_000_000))
    with pytest.raises(SetupError, match=r"does not fit into --memory 10\.0 MB: layer by layer it needs \d+") as caught:
        scorer.score(PAIRS)
    assert caught.value.exit_code == 4


def test_a_prompt_that_is_too_long_for_the_budget_is_refused(vl_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = layerwise(vl_model)
    model = scorer._reader.model
    spare = BUDGET - model.footprint.fixed
    monkeypatch.setattr(model, "footprint", replace(model.footprint, token=spare // 300))
    with pytest.raises(SetupError, match=r"A prompt of [\d,]+ tokens does not fit into 16\.0+ GB of memory"):
        scorer.score([Pair(Item("q", ("ball",)), Item("d", ("a much longer document " * 99,)))])


def need(**sizes: int) -> Footprint:
    return Footprint(
        **{"whole": 32 * GB, "layer": 800_000_000, "tower": 0, "token": 300_000, "process": 500_000_000, **sizes}
    )


@pytest.mark.parametrize(
    ("free", "sizes", "expected"),
    [
        (None, {}, None),  # not known: as ever
        (64 * GB, {}, None),
        (20 * GB, {}, 16.5 * GB),
        (20 * GB, {"whole": 8 * GB}, None),
    ],
)
def test_auto_runs_whole_what_fits(
    free: int | None, sizes: dict[str, int], expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda: free)
    assert layerwise_budget(need(**sizes), CPU, "auto") == expected


def test_what_fits_in_no_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda: 2 * GB)
    with pytest.raises(SetupError, match=r"2\.00 GB are free; the model needs 32\.00 GB, or layer by layer 2\.18 GB"):
        layerwise_budget(need(), CPU, "auto")


@pytest.mark.parametrize("size", ["5x", "", "0", "-1", "8 GBs", -1, 0])
def test_a_size_that_is_none_is_a_usage_error(size: str | int) -> None:
    with pytest.raises(UsageError, match="Invalid size"):
        api.score("qtool-demo-reranker", panel="demo-text", memory=size, progress=None)


@pytest.mark.parametrize("size", [1.5, None, True])
def test_what_is_no_size_at_all_is_a_usage_error(size: object) -> None:
    with pytest.raises(UsageError, match=r"Invalid memory .*: expected auto, a size such as 8GB or a whole number"):
        api.score("qtool-demo-reranker", panel="demo-text", memory=size, progress=None)  # type: ignore[arg-type]


def test_a_server_and_a_gguf_file_take_no_memory(demo_gguf: Path) -> None:
    for target in ("http://localhost:1", demo_gguf):
        with pytest.raises(UsageError, match="--memory applies to checkpoints only"):
            api.score(target, panel="demo-text", memory="8GB", progress=None)


@pytest.fixture
def demo_gguf(tmp_path: Path) -> Path:
    api.convert_gguf("qtool-demo-reranker", output=tmp_path / "gguf", outtypes="q8_0", progress=None)
    return tmp_path / "gguf"


# Where tensors wait, and what the system says of memory.


def test_a_store_gives_back_what_was_put_last() -> None:
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in (("a", torch.float32), ("b", torch.bfloat16))}
    for memory_bytes in (0, 60, 1000):
        with ActivationStore(memory_bytes, CPU) as store:
            for factor in (1, 2):
                for name, tensor in tensors.items():
                    store[name] = tensor * factor
            for name, tensor in tensors.items():
                assert torch.equal(store[name], tensor * 2)
            assert "c" not in store


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with (
        ActivationStore(0, CPU) as store,
        pytest.raises(SetupError, match=r"not enough disk space in .* for 60 B of hidden states"),
    ):
        store["a"] = torch.zeros(3, 5)


def test_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/meminfo": "MemTotal: 24000 kB\nMemAvailable:   20000 kB\n",
        "proc/self/cgroup": "0::/job\n",
        "proc/self/statm": "100 7 1 1 0 1 0\n",
        "cgroup/job/memory.max": "9000000\n",
        "cgroup/job/memory.current": "5000000\n",
        "cgroup/job/memory.stat": "anon 3000000\ninactive_file 2000000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    assert memory.free_memory() == 6_000_000
    (tmp_path / "cgroup/job/memory.max").write_text("max\n")
    assert memory.free_memory() == 20_480_000
    monkeypatch.setattr(memory, "_PROC", tmp_path / "nowhere")
    assert memory.free_memory() is None
    assert memory.resident_memory() == 0
