"""Mixed precision: the effect of each fused group on the answers, what stays within a budget, and the recipe that says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtool import api
from qtool.artefact import CheckpointArtefact
from qtool.calibration import sensitivity, tune, tune_model
from qtool.calibration.choice import LEVELS, Candidate, bits_per_weight, levels_within, within
from qtool.calibration.data import load_calibration, questions
from qtool.errors import SetupError, UsageError
from qtool.export.quantize import prepare_quantization
from qtool.progress import ignore
from qtool.recipe import load_recipe
from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer
from qtool.storage.hub import Source
from tests.scoring import tiny
from tests.tiny import read_bytes_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with pictures, as a reranker and as an embedder."""
    made = {}
    for task, module in (("rerank", "LogitScore"), ("embed", "Pooling")):
        made[task] = tiny.write_vl(tmp_path_factory.mktemp(task) / "vl")
        (made[task] / "modules.json").write_text(
            f'[{{"type": "sentence_transformers.{module}", "path": "1_{module}"}}]'
        )
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight queries with texts and pictures."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for query in range(8):
        pixels = np.random.default_rng(query).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{query}.png")
        documents = [
            {"id": f"a{query}", "label": 1, "text": f"ball number {query} " * (1 + query % 3)},
            {"id": f"b{query}", "label": 0, "text": "a box", "image": f"{query}.png"},
        ]
        lines.append({"id": f"q{query}", "query": {"text": f"which ball is {query}?"}, "documents": documents})
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "data.jsonl"


@pytest.mark.parametrize("task", ["rerank", "embed"])
def test_an_effect_is_what_rounding_the_group_changes_to_first_order(
    task: str, models: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hundredth of the rounding, second orders are a ten-thousandth: the exact change is that of the whole model."""
    whole = sensitivity.rounding

    def small(weights):  # type: ignore[no-untyped-def]
        deltas, squares = whole(weights)
        return [delta * 1e-2 for delta in deltas], squares

    monkeypatch.setattr(sensitivity, "rounding", small)
    options = tune.TuneOptions(model=str(models[task]), budget="6", data=(str(data),))
    job = prepare_quantization(options.quantizing)
    opened = CheckpointArtefact(Source(models[task], "tiny"))
    panel = load_calibration(options.data)
    with tune_model.opened_sensitivity(opened, job, panel, options, ignore) as measuring:
        effects = measuring.effects()
    scorer = open_scorer(models[task], ScorerOptions(device="cpu"))
    asked = questions(panel, scorer.task, scorer.query_instruction)
    base = scorer.loaded.reader.forward.base  # type: ignore[attr-defined]

    def answers() -> np.ndarray:
        if task == "rerank":
            return np.array(scorer.score(asked))[:, None]  # type: ignore[arg-type]
        return scorer.embed(asked).astype(np.float64)  # type: ignore[arg-type]

    reference = answers()
    if task == "rerank":
        along = np.ones((len(reference), 1))
    else:
        import torch

        drawn = torch.randint(
            0, 2, (sensitivity.PROBES, reference.shape[1]), generator=torch.Generator().manual_seed(0)
        )
        along = (drawn.numpy() * 2 - 1)[effects.probes]
    prefix = opened.detection.architecture.prefix
    for each in effects.groups:
        linears = [base.get_submodule(t.spec.module.removeprefix(prefix)) for t in job.plan.groups[each.group]]
        kept = [linear.weight.data.clone() for linear in linears]
        for linear, delta in zip(linears, small(kept)[0], strict=True):
            linear.weight.data += delta
        exact = ((answers() - reference) * along).sum(axis=1)
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
        size = max(float(np.abs(exact).max()), 1e-5)
        np.testing.assert_allclose(each.change, exact, rtol=0, atol=0.05 * size, err_msg=each.group)


def groups_of(*drifts: float, weights: int = 1024) -> list[Candidate]:
    return [
        Candidate(f"g{number}", weights, weights * 9 // 16, weights * 2, drift, drift, 0.1)
        for number, drift in enumerate(drifts)
    ]


def test_the_groups_that_cost_most_drift_for_a_bit_stay_first() -> None:
    groups = [*groups_of(0.1, 0.3, 0.2), Candidate("large", 9216, 5184, 18432, 0.35, 0.35, 0.1)]
    assert within(groups, 5.6) == ("g1",)
    assert within(groups, 6.5) == ("g1", "g2")
    assert bits_per_weight(groups) == pytest.approx(4.5)
    assert bits_per_weight(groups, within(groups, 6.5)) <= 6.5


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (4.2, "out of range: all quantized are 4.50, none 16"),
        (17, "out of range"),
        (4.6, "No fused group fits into 4.6"),
    ],
)
def test_a_budget_that_nothing_fits_is_refused_with_one_that_does(budget: float, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        within(groups_of(0.1, 0.2), budget)
    assert "--budget" in refused.value.hint


def test_types_of_llama_cpp_stay_within_the_budget_and_go_where_they_matter() -> None:
    groups = groups_of(0.1, 0.4, 0.2, 0.1)
    types = levels_within(groups, 5.2)
    assert sum(each.bits for each in types.values()) / 4 <= 5.2
    order = [LEVELS.index(types[f"g{number}"]) for number in (1, 2, 0)]
    assert order == sorted(order, reverse=True)
    assert len(set(order)) > 1
    assert {each.name for each in levels_within(groups, 4.5).values()} == {"q4_k"}
    assert {each.name for each in levels_within(groups, 16).values()} == {"q8_0"}


@pytest.fixture(scope="module")
def tuned(models: dict[str, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "out"
    api.tune(models["rerank"], budget=7.5, data=data, output=output, effort="fast", progress=None)
    return output


def test_the_recipe_that_is_found_is_carried_out_by_quantize(
    tuned: Path, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(str(tuned / "recipe.yaml"))
    kept = [pattern for keep in recipe.recipe.keep for pattern in keep.groups or ()]
    assert kept
    assert "held out" in recipe.text  # how it came about
    api.quantize(models["rerank"], recipe=tuned / "recipe.yaml", data=data, output=tmp_path / "out", progress=None)
    before, after = read_bytes_of(models["rerank"]), read_bytes_of(tmp_path / "out")
    facts = json.loads((tuned / "tune.json").read_text())
    assert {each["group"] for each in facts["groups"] if each["kept"]} == set(kept)
    tensors = json.loads((tmp_path / "out" / "qtool.json").read_text())["tensors"]
    stayed = [each["name"] for each in tensors if each["rule"] in kept]
    assert len(stayed) >= len(kept)
    assert all(before[name] == after[name] for name in stayed)
    report = api.verify(tmp_path / "out", reference=models["rerank"], structure_only=True, use_cache=False)
    assert next(stage for stage in report.stages if stage.name == "structure").outcome.value == "pass"


def test_what_was_measured_is_in_the_folder(tuned: Path) -> None:
    facts = json.loads((tuned / "tune.json").read_text())
    names = [each["name"] for each in facts["measured"]]
    assert names[:3] == ["bf16", "max", "nvfp4-w4a16-calibrated"]
    assert names[-1] == facts["name"]
    assert facts["budget"] == 7.5
    assert 4.5 < facts["bits_per_weight"] <= 7.5 < facts["model_bits_per_weight"]
    assert facts["held_out"] == 2
    by_name = {each["name"]: each["centred"] for each in facts["measured"]}
    assert 0 < by_name[facts["name"]] < by_name["max"]
    bits, drift = zip(*facts["predicted"], strict=True)
    assert list(bits) == sorted(bits)
    assert drift[-1] == 0
    page = (tuned / "tune.html").read_text()
    assert page.count("<svg") == 1
    assert all(name in page for name in names)
    assert sorted(path.name for path in tuned.iterdir()) == ["qtool.json", "recipe.yaml", "tune.html", "tune.json"]


def test_a_drift_is_reached_with_as_few_bits_as_are_found_to_do(
    models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    options = {"recipe": "nvfp4-w4a16", "data": data, "progress": None}
    whole = api.tune(models["embed"], max_drift=1e9, output=tmp_path / "none", **options)
    assert (whole.kept, whole.met, whole.measured[-1].name) == ((), True, "nvfp4-w4a16")
    limit = whole.measured[-1].centred / 2
    found = api.tune(models["embed"], max_drift=limit, output=tmp_path / "some", **options)
    assert found.met
    assert 0 < len(found.kept) < len(found.groups)
    assert found.measured[-1].centred <= limit


def test_a_dry_run_predicts_and_writes_nothing(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    found = api.tune(models["rerank"], budget="5.5bpw", data=data, output=tmp_path / "out", dry_run=True, progress=None)
    assert found.seconds > 0
    assert found.measured == ()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "Missing --budget"),
        ({"budget": 5, "max_drift": 0.1}, UsageError, "--budget cannot be combined with --max-drift"),
        ({"budget": "five"}, UsageError, "Invalid --budget 'five': expected bits per weight"),
        ({"max_drift": -1}, UsageError, "Invalid --max-drift -1"),
        ({"budget": 4.5}, UsageError, r"No fused group fits into 4\.5"),
        ({"budget": 5, "limit": 3}, UsageError, "has 3 queries; tuning needs at least 8"),
        ({"budget": 5, "memory": "1MB"}, SetupError, r"Tuning the model needs .* of memory; 1\.0 MB may be used"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: dict[str, object],
    error: type[Exception],
    message: str,
    models: dict[str, Path],
    data: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        api.tune(models["rerank"], output=tmp_path / "out", data=data, progress=None, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
