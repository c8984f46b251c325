"""Quantizing with data: closer to the reference, the same layout, the same bytes whatever interrupts or divides the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qtool
from qtool import api, resources, workers
from qtool.calibration import quantize as job
from qtool.calibration import streams
from qtool.calibration.gradients import GradientPass
from qtool.calibration.workfolder import WorkFolder
from qtool.checks.stage import Stage
from qtool.errors import SetupError, UsageError
from qtool.export.quantize import QuantizeOptions
from qtool.inputs.builtin import load_panels
from qtool.inputs.panels import Panel
from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer
from tests.checks import surgery
from tests.scoring import tiny
from tests.tiny import read_bytes_of

RECIPE = "nvfp4-w4a16-calibrated"


@pytest.fixture(scope="module")
def vl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny.write_vl(tmp_path_factory.mktemp("models") / "vl")
    (made / "modules.json").write_text('[{"type": "sentence_transformers.LogitScore", "path": "1_LogitScore"}]')
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four queries with texts and pictures, which share beginnings."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for query in range(4):
        documents: list[dict[str, object]] = []
        for number in range(3):
            pixels = np.random.default_rng(10 * query + number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{query}-{number}.png")
            document = {"id": f"d{query}{number}", "label": number % 2, "text": f"ball number {number} " * (2 + query)}
            documents.append(document | ({"image": f"{query}-{number}.png"} if number == 2 else {}))
        lines.append({"id": f"q{query}", "query": {"text": f"which ball is {query}?"}, "documents": documents})
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "data.jsonl"


def calibrated(model: Path | str, output: Path, data: Path | str | tuple[str, ...] = (), **options: object) -> Path:
    api.quantize(model, recipe=RECIPE, output=output, data=data, progress=None, **options)
    return output


@pytest.fixture(scope="module")
def artefact(vl_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(vl_model, tmp_path_factory.mktemp("made") / "out", data)


def drift(artefact: Path, model: str, panel: Panel) -> float:
    found, expected = (
        open_scorer(each, ScorerOptions(device="cpu")) for each in (artefact, resources.demo_model(model))
    )
    if found.task.value == "rerank":
        difference = np.subtract(found.score(panel.pairs), expected.score(panel.pairs))
    else:
        items = [document for query in panel.queries for document in query.documents]
        difference = found.embed(items) - expected.embed(items)
    return float(np.sqrt(np.mean(difference**2)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe with a quarter of the demo data, which takes seconds."""
    text = resources.path(f"recipes/{RECIPE}.yaml").read_text().replace("tokens: 65536", "tokens: 1500")
    recipe = tmp_path_factory.mktemp("recipes") / "small.yaml"
    recipe.write_text(text)
    return recipe


@pytest.mark.parametrize("model", ["qtool-demo-reranker", "qtool-demo-embedder"])
def test_a_demo_model_is_closer_to_its_reference_and_verified(model: str, small: Path, tmp_path: Path) -> None:
    api.quantize(model, output=tmp_path / "max", progress=None)
    api.quantize(model, recipe=small, output=tmp_path / "fitted", progress=None)
    (panel,) = load_panels(["demo-mixed"], 4)
    assert drift(tmp_path / "fitted", model, panel) < 0.5 * drift(tmp_path / "max", model, panel)
    report = qtool.verify(
        tmp_path / "fitted", reference=model, structure_only=True, rederive=True, use_cache=False, progress=None
    )
    outcomes = {stage.name: stage.outcome.value for stage in report.stages}
    assert (outcomes["structure"], outcomes["rederive"]) == ("pass", "pass")


def rederived(artefact: Path, reference: Path, **options: object) -> Stage:
    report = qtool.verify(artefact, reference=reference, structure_only=True, rederive=True, progress=None, **options)
    return next(stage for stage in report.stages if stage.name == "rederive")


def test_an_artefact_whose_data_is_not_here_is_not_judged(vl_model: Path, artefact: Path) -> None:
    stage = rederived(artefact, vl_model)
    assert stage.outcome.value == "skipped"
    assert "The weights were fitted to data that is not here: data.jsonl, SHA-256" in stage.summary
    assert stage.summary.endswith("Pass it with --data FILE.")


def test_data_is_recognised_by_its_hash_and_its_name_does_not_count(
    vl_model: Path, data: Path, artefact: Path, tmp_path: Path
) -> None:
    for picture in data.parent.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    (tmp_path / "mine.jsonl").write_bytes(data.read_bytes())
    assert rederived(artefact, vl_model, data=tmp_path / "mine.jsonl").outcome.value == "pass"
    (tmp_path / "mine.jsonl").write_bytes(data.read_bytes().replace(b"ball", b"bell"))
    with pytest.raises(
        UsageError, match=r"mine\.jsonl is not the data .*: its SHA-256 is \w{64}, expected \w{64} \(data"
    ):
        rederived(artefact, vl_model, data=tmp_path / "mine.jsonl")
    with pytest.raises(UsageError, match="applies to --rederive only"):
        qtool.verify(artefact, reference=vl_model, structure_only=True, data=data)


def test_a_data_set_and_a_limit_are_calibrated_on_and_found_again(vl_model: Path, tmp_path: Path) -> None:
    rows = [{"q": f"which {number}", "d": f"the ball of {number}"} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = {"dataset": str(tmp_path / "rows.jsonl"), "columns": "query=q,positive=d"}
    api.quantize(vl_model, recipe=RECIPE, output=tmp_path / "out", limit=3, effort="fast", progress=None, **options)
    facts = json.loads((tmp_path / "out/qtool.json").read_text())["calibration"]
    assert (facts["queries"], facts["limit"]) == (3, 3)
    assert facts["sources"][0]["name"] == "dataset:rows.jsonl?query=q,positive=d"
    assert rederived(tmp_path / "out", vl_model, **options).outcome.value == "pass"
    missing = rederived(tmp_path / "out", vl_model)
    assert "data set rows.jsonl with --columns query=q,positive=d, SHA-256" in missing.summary


def test_a_gguf_file_of_calibrated_weights_is_rederived(
    vl_model: Path, data: Path, artefact: Path, tmp_path: Path
) -> None:
    api.convert_gguf(artefact, output=tmp_path / "m.gguf", outtypes="nvfp4", mmproj="none", progress=None)
    stage = rederived(tmp_path / "m.gguf", vl_model, data=data)
    assert (stage.outcome.value, stage.findings) == ("pass", ())
    assert rederived(tmp_path / "m.gguf", vl_model).outcome.value == "skipped"


def test_other_bytes_on_another_kind_of_processor_prove_nothing(
    vl_model: Path, data: Path, artefact: Path, tmp_path: Path
) -> None:
    """As calibrated elsewhere: a code of one weight is another, and the manifest names another kind of processor."""
    other = shutil.copytree(artefact, tmp_path / "other")
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    surgery.weights(other, lambda tensors: tensors[name].data.__setitem__((0, 0), tensors[name].data[0, 0] ^ 1))
    assert rederived(other, vl_model, data=data).outcome.value == "fail"
    surgery.edit(other / "qtool.json", lambda manifest: manifest["run"]["processor"].update(blas="openblas SkylakeX"))
    stage = rederived(other, vl_model, data=data)
    assert stage.outcome.value == "inconclusive"
    assert [each.code for each in stage.findings] == ["rederived-otherwise"]
    assert "SkylakeX" in stage.summary
    surgery.weights(other, lambda tensors: tensors["model.language_model.norm.weight"].data.__setitem__(0, 0x3F00))
    assert rederived(other, vl_model, data=data).outcome.value == "fail"  # that weight is copied


def test_manifests_of_two_runs_differ_in_how_they_ran_only(
    vl_model: Path, data: Path, artefact: Path, tmp_path: Path
) -> None:
    calibrated(vl_model, tmp_path / "again", data)
    first, second = (json.loads((each / "qtool.json").read_text()) for each in (artefact, tmp_path / "again"))
    assert {key for key in first if first[key] != second[key]} <= {"run"}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("models") / "text", labels=1)


@pytest.fixture(scope="module")
def enough(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen queries with two texts each: more than five tokens for each input."""
    random = np.random.default_rng(3)
    words = ["ball", "number", "query", "which", "yes", "no", "system", "judge", "document", "meets", "the"]
    lines = []
    for query in range(16):
        documents = [
            {"id": f"d{query}{n}", "label": n, "text": " ".join(random.choice(words, 10 + 5 * n))} for n in (0, 1)
        ]
        question = {"text": " ".join(random.choice(words, 6))}
        lines.append({"id": f"q{query}", "query": question, "documents": documents})
    path = tmp_path_factory.mktemp("data") / "enough.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def best(text_model: Path, enough: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(text_model, tmp_path_factory.mktemp("made") / "best", enough, effort="best", task="rerank")


def test_the_effort_best_follows_the_answer(text_model: Path, enough: Path, best: Path, tmp_path: Path) -> None:
    (panel,) = load_panels([str(enough)])
    standard = calibrated(text_model, tmp_path / "standard", enough, task="rerank")
    expected, *found = (
        np.array(open_scorer(each, ScorerOptions(device="cpu")).score(panel.pairs))
        for each in (text_model, standard, best)
    )
    plain, followed = (np.sqrt(np.mean(np.square(each - expected))) for each in found)
    assert followed < 0.8 * plain
    facts = json.loads((best / "qtool.json").read_text())["calibration"]
    assert (facts["effort"], facts["parameters"]["gradients"], facts["warnings"]) == ("best", True, [])


def test_a_run_killed_in_the_gradients_goes_on_at_their_layer(
    text_model: Path, enough: Path, best: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = GradientPass.through, []

    def through(gradients: GradientPass, layer: int, weights: object) -> object:
        seen.append(layer)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return whole(gradients, layer, weights)

    monkeypatch.setattr(GradientPass, "through", through)
    options = {"effort": "best", "task": "rerank"}
    with pytest.raises(KeyboardInterrupt):
        calibrated(text_model, tmp_path / "again", enough, **options)
    calibrated(text_model, tmp_path / "again", enough, **options)
    assert seen == [2, 1, 1, 0]
    assert read_bytes_of(tmp_path / "again") == read_bytes_of(best)


def test_best_does_what_standard_does_where_the_data_does_not_carry_it(
    vl_model: Path, enough: Path, tmp_path: Path
) -> None:
    """No picture, to a model that reads pictures."""
    summary = api.quantize(vl_model, recipe=RECIPE, effort="best", output=tmp_path / "out", data=enough, progress=None)
    assert job.NOT_BEST in summary.calibration.warnings
    facts = json.loads((tmp_path / "out" / "qtool.json").read_text())["calibration"]
    assert job.NOT_BEST in facts["warnings"]
    assert (facts["effort"], facts["parameters"]["gradients"]) == ("best", False)


def test_only_quantized_linears_differ_from_plain_max_and_the_layout_is_the_same(
    vl_model: Path, artefact: Path, tmp_path: Path
) -> None:
    api.quantize(vl_model, output=tmp_path / "max", progress=None)
    plain, fitted = read_bytes_of(tmp_path / "max"), read_bytes_of(artefact)
    assert {name: each[:2] for name, each in plain.items()} == {name: each[:2] for name, each in fitted.items()}
    unequal = {name for name in plain if plain[name][2] != fitted[name][2]}
    assert unequal
    assert all("_proj.weight" in name and "visual" not in name for name in unequal)
    for name in ("config.json", "hf_quant_config.json"):
        assert (tmp_path / "max" / name).read_bytes() == (artefact / name).read_bytes()


def test_the_manifest_says_how(artefact: Path, data: Path) -> None:
    manifest = json.loads((artefact / "qtool.json").read_text())
    facts = manifest["calibration"]
    assert facts["sha256"] == load_panels([str(data)])[0].sha256
    assert facts["algorithm"] == "calibrated"
    assert facts["parameters"]["passes"] == 8
    assert facts["passes_tokens"] >= facts["tokens"] > 200  # documents of a query may begin alike
    assert facts["sources"] == [{"name": "data.jsonl", "sha256": facts["sha256"]}]
    assert facts["picture_tokens"] == 4 * 6
    assert manifest["run"]["seconds"] > 0
    assert manifest["run"]["processor"]["blas"]
    weights = [tensor for tensor in manifest["tensors"] if tensor["action"] == "quantize"]
    assert len(weights) == 3 * 7
    for weight in weights:
        assert 0 < weight["output_error"] < weight["max_output_error"]
        assert 0 < weight["predicted_gain"] < 1
        assert 0 < weight["relative_error"] < 0.3
    assert not artefact.with_name("out.calibration").exists()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_killed_run_goes_on_at_its_layer(
    layers: int, vl_model: Path, data: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, rounded = job.CalibrationRun.round_layer, []

    def killed(run: job.CalibrationRun, layer: int, *rest: object) -> object:
        if layer == layers:
            raise KeyboardInterrupt
        return whole(run, layer, *rest)

    monkeypatch.setattr(job.CalibrationRun, "round_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrated(vl_model, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(
        job.CalibrationRun, "round_layer", lambda run, layer, *rest: rounded.append(layer) or whole(run, layer, *rest)
    )
    calibrated(vl_model, tmp_path / "out", data)
    assert rounded == list(range(layers, 3))
    assert read_bytes_of(tmp_path / "out") == read_bytes_of(artefact)


def test_a_run_with_other_options_does_not_go_on_from_there(
    vl_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(WorkFolder, "save_streams", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            calibrated(vl_model, tmp_path / "out", data)
    with pytest.raises(UsageError, match="holds an interrupted calibration with another model, recipe, effort or data"):
        calibrated(vl_model, tmp_path / "out", data, effort="fast")
    calibrated(vl_model, tmp_path / "out", data, effort="fast", force=True)
    assert (tmp_path / "out" / "qtool.json").is_file()


def test_the_number_of_threads_and_the_memory_change_no_byte(
    vl_model: Path, data: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 5):
        monkeypatch.setattr(workers, "WORKERS", number)
        monkeypatch.setattr(streams, "WORKERS", number)
        monkeypatch.setattr(job, "_budget", lambda _, fixed: fixed)  # every hidden state in the scratch file
        calibrated(vl_model, tmp_path / f"out-{number}", data)
        assert read_bytes_of(tmp_path / f"out-{number}") == read_bytes_of(artefact)


def test_the_quantized_stream_is_what_the_artefact_computes(
    vl_model: Path, data: Path, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last layer both streams end where the two models' forward passes do: same last hidden states."""
    kept: dict[str, np.ndarray] = {}
    whole = job.CalibrationRun.round_layers

    def observed(run: job.CalibrationRun, *rest: object) -> None:
        whole(run, *rest)
        index, each = next((n, each) for n, each in enumerate(run.streams.passes) if each.prompts)
        for stream in ("original", "quantized"):
            state = run.streams.store[stream, index][0, len(each.spans[0]) - 1][None]
            kept[stream] = run.model.normed(state)[0].numpy()
        kept["prompt"] = np.array(each.prompts[:1])

    monkeypatch.setattr(job.CalibrationRun, "round_layers", observed)
    calibrated(vl_model, tmp_path / "out", data)
    (panel,) = load_panels([str(data)])
    for stream, folder in (("original", vl_model), ("quantized", artefact)):
        scorer = open_scorer(folder, ScorerOptions(device="cpu"))
        reader, prompts = scorer.loaded.reader, [scorer.prompt(pair) for pair in panel.pairs]
        (place,) = kept["prompt"]
        ends = {n: row for chosen, hidden in reader.last_hidden(prompts) for n, row in zip(chosen, hidden, strict=True)}
        np.testing.assert_allclose(kept[stream], ends[place].numpy(), rtol=0, atol=2e-5)


def test_a_dry_run_measures_a_layer_and_writes_nothing(vl_model: Path, data: Path, tmp_path: Path) -> None:
    summary = api.quantize(vl_model, recipe=RECIPE, output=tmp_path / "out", data=data, dry_run=True, progress=None)
    assert summary.calibration is not None
    assert summary.calibration.seconds > 0
    assert summary.calibration.memory > 100_000_000
    assert summary.calibration.disk > 10_000
    assert summary.calibration.tokens > 200
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_tokens_of_all_layers(vl_model: Path, data: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    api.quantize(
        vl_model, recipe=RECIPE, output=tmp_path / "out", data=data, progress=lambda *state: seen.append(state)
    )
    fitting = [(done, total) for stage, done, total in seen if stage.startswith("calibrating")]
    assert fitting == sorted(fitting)
    assert fitting[0][0] == 0
    assert fitting[-1][0] == fitting[-1][1]
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == [
        *(f"calibrating, layer {layer} of 3" for layer in (1, 2, 3)),
        "calibrating",
        "writing",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"recipe": "nvfp4-w4a16", "data": "demo-calibration"},
            UsageError,
            "--data applies to calibrated recipes only",
        ),
        (
            {"recipe": "nvfp4-w4a16", "effort": "fast", "data": ()},
            UsageError,
            "--effort applies to calibrated recipes only",
        ),
        ({"recipe": RECIPE, "effort": "most"}, UsageError, "Invalid effort 'most': expected fast, standard or best"),
        (
            {"recipe": "nvfp4-w4a16", "device": "cpu", "data": ()},
            UsageError,
            "--device applies to calibrated recipes only",
        ),
        ({"recipe": RECIPE, "device": "mps"}, UsageError, "cannot be fitted to data on mps"),
        ({"recipe": RECIPE, "backend": "modelopt"}, UsageError, "ModelOpt does not know the algorithm"),
        ({"recipe": RECIPE, "data": "nope"}, UsageError, "Unknown calibration data 'nope'"),
        ({"recipe": RECIPE, "memory": "5x"}, UsageError, "Invalid size '5x'"),
        ({"recipe": RECIPE, "memory": "1MB"}, SetupError, r"needs .* of memory; 1\.0 MB may be used"),
    ],
)
def test_what_cannot_be_done_is_refused(
    options: dict[str, str], error: type[Exception], message: str, vl_model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        api.quantize(vl_model, output=tmp_path / "out", progress=None, **{"data": data, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_without_data_is_not_carried_out_plainly(vl_model: Path, tmp_path: Path) -> None:
    from qtool.export.quantize import quantize

    with pytest.raises(UsageError, match="fits weights to data; without the data its weights cannot be made"):
        quantize(QuantizeOptions(model=str(vl_model), recipe=RECIPE, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
