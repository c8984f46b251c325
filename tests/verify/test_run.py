from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from qtool import resources
from qtool.arch.spec import Task
from qtool.artefact import Artefact
from qtool.errors import ModelError, UsageError
from qtool.inputs.builtin import find_panel
from qtool.reporting.console import render_console
from qtool.reporting.run import verify
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.scorer import Scorer
from qtool.scoring.transformers import runtime
from qtool.scoring.transformers.runtime import LoadedCheckpoint, OpenCheckpoint, TransformersScorer
from qtool.verify import stages as checks
from qtool.verify.case import VerifyOptions, open_case
from qtool.verify.gates import Verdict
from qtool.verify.report import Report
from tests.scoring import tiny

RECIPE = """
name: tiny
description: for tests
scheme: W4A16_NVFP4
block_size: 16
algorithm: max
quantize: ["*_proj"]
keep: []
gates:
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_vl(tmp_path_factory.mktemp("verify") / "model")


@pytest.fixture(scope="module")
def noisy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a little noise on every weight."""
    folder = tmp_path_factory.mktemp("verify") / "noisy"
    shutil.copytree(model, folder)
    torch.manual_seed(0)
    tensors = load_file(model / "model.safetensors")
    save_file({k: v * (1 + 0.05 * torch.randn_like(v)) for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("panel")
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    documents = [{"text": "a [red] ball", "label": 1}, {"image": "red.png", "label": 2}, {"text": "no", "label": 0}]
    lines = [{"query": f"which ball {n}?", "documents": documents} for n in range(4)]
    path = folder / "balls.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def recipe(folder: Path, gates: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE + gates)
    return str(path)


def run(artefact: Path, reference: Path, panel: Path, **options: object) -> Report:
    defaults = {"task": Task.RERANK, "device": "cpu", "noise_queries": 0, "panels": (str(panel),)}
    chosen = {**defaults, **options}
    return verify(VerifyOptions(artefact=str(artefact), reference=str(reference), **chosen))


def test_a_model_against_itself_passes_every_gate_but_no_ranking_on_four_queries(
    model: Path, panel: Path, tmp_path: Path
) -> None:
    gates = "  log_odds_max: {max: 0}\n  log_odds_rmse: {max: 0}\n  cosine_min: {min: 1}"
    report = run(model, model, panel, recipe=recipe(tmp_path, gates))
    assert report.verdict is Verdict.PASS
    assert [(stage.name, stage.outcome.value) for stage in report.stages if stage.name in ("scores", "ranking")] == [
        ("scores", "pass"),
        ("ranking", "skipped"),
    ]
    ranked = run(model, model, panel, recipe=recipe(tmp_path, gates + "\n  kendall_tau: {min: 0.5}"))
    assert ranked.verdict is Verdict.INCONCLUSIVE
    assert ranked.gates[-1].reason == "within bounds, but on 4 queries; a pass needs 100"
    assert ranked.passed
    assert report.panels[0].metrics["ndcg10_drop"] == 0
    assert (report.panels[0].queries, report.panels[0].pairs) == (4, 12)


def test_noise_shows_in_the_numbers_and_fails_a_tight_gate(
    model: Path, noisy: Path, panel: Path, tmp_path: Path
) -> None:
    report = run(noisy, model, panel, recipe=recipe(tmp_path, "  log_odds_rmse: {max: 1.0e-4}"))
    assert report.verdict is Verdict.FAIL
    assert not report.passed
    assert report.panels[0].metrics["log_odds_rmse"] > 1e-3
    worst = report.panels[0].worst
    assert [abs(pair.delta) for pair in worst] == sorted((abs(pair.delta) for pair in worst), reverse=True)
    assert worst[0].delta == worst[0].artefact - worst[0].reference
    assert {pair.document for pair in worst} == {"a [red] ball", "[red.png]", "no"}


def test_embedders_are_compared_by_cosine_and_each_content_is_embedded_once(
    model: Path, noisy: Path, panel: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    options = VerifyOptions(
        artefact=str(noisy),
        reference=str(model),
        panels=(str(panel),),
        task=Task.EMBED,
        device="cpu",
        noise_queries=0,
    )
    report = verify(options, lambda *progress: seen.append(progress))
    assert 0.5 < report.panels[0].metrics["cosine_min"] < 1
    assert "log_odds_rmse" not in report.panels[0].metrics
    assert ("scores of the artefact", 7, 7) in seen  # four queries and three documents
    assert seen[-1] == ("scores of the reference", 7, 7)
    assert run(model, model, panel, task=Task.EMBED).panels[0].metrics["cosine_min"] == pytest.approx(1)


@pytest.mark.parametrize("noise_queries", [0, 2])
def test_each_runtime_is_opened_once_and_one_model_is_in_memory_at_a_time(
    model: Path, noisy: Path, panel: Path, monkeypatch: pytest.MonkeyPatch, noise_queries: int
) -> None:
    events: list[str] = []
    names = {noisy: "artefact", model: "reference"}
    load, close = runtime.load, TransformersScorer.close

    def opened(target: Artefact, options: RuntimeOptions) -> Scorer:
        events.append(f"open {names[target.path]}")
        return open_runtime(target, options)

    def loaded(checkpoint: OpenCheckpoint, *rest: object) -> LoadedCheckpoint:
        events.append(f"load {names[checkpoint.checkpoint.directory]}")
        return load(checkpoint, *rest)

    def closed(scorer: TransformersScorer) -> None:
        events.append(f"close {names[scorer._opened.checkpoint.directory]}")
        close(scorer)

    monkeypatch.setattr("qtool.verify.collect.open_runtime", opened)
    monkeypatch.setattr(runtime, "load", loaded)
    monkeypatch.setattr(TransformersScorer, "close", closed)
    run(noisy, model, panel, noise_queries=noise_queries, use_cache=False)
    one = ["open reference", "open artefact", "load artefact", "close artefact", "load reference", "close reference"]
    assert events == one + (["open reference", "load reference", "close reference"] if noise_queries else [])


def test_the_library_writes_the_reports(model: Path, panel: Path, tmp_path: Path) -> None:
    report = run(model, model, panel, output=tmp_path / "out", use_cache=False)
    files = {path.name: path for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert set(files) == {"report.json", "report.md", "report.html", "junit.xml"}
    assert json.loads(files["report.json"].read_text()) == json.loads(report.to_json())
    with pytest.raises(UsageError, match="holds a finished verification"):
        run(model, model, panel, output=tmp_path / "out")
    assert run(model, model, panel, output=tmp_path / "out", force=True, use_cache=False).panels == report.panels


def test_a_reference_in_bf16_has_no_noise_floor_of_its_own(model: Path, panel: Path) -> None:
    report = run(model, model, panel, noise_queries=2, dtype="bfloat16")
    noise = next(stage for stage in report.stages if stage.name == "noise")
    assert (report.noise, noise.outcome.value) == (None, "skipped")
    assert "bfloat16" in noise.summary
    assert "decisive_flips" not in report.panels[0].metrics


def test_a_server_has_no_structure_that_could_pass(model: Path, panel: Path) -> None:
    with pytest.raises(UsageError, match="shows no files"):
        run("http://127.0.0.1:9", model, panel, structure_only=True)


def test_the_prompts_of_an_embedders_queries_are_compared_too(
    model: Path, panel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    stage = checks.compare_prompts
    monkeypatch.setattr(checks, "compare_prompts", lambda *sides: seen.extend(sides[2]) or stage(*sides))
    run(model, model, panel, task=Task.EMBED)
    assert [item.id for item in seen] == ["q1", "d1", "d2", "d3"]


def test_the_artefacts_own_recipe_brings_the_gates(model: Path, panel: Path, tmp_path: Path) -> None:
    artefact = Path(shutil.copytree(model, tmp_path / "m"))
    assert run(artefact, model, panel).recipe == "nvfp4-w4a16"
    none = run(artefact, model, panel, recipe=recipe(tmp_path, "  cosine_p1: {min: 0.5}"))
    assert none.verdict is Verdict.UNGATED
    (artefact / "qtool.json").write_text(json.dumps({"recipe": {"text": RECIPE + "  log_odds_rmse: {max: 1}"}}))
    report = run(artefact, model, panel)
    assert (report.verdict, report.recipe) == (Verdict.PASS, "tiny")
    (artefact / "qtool.json").write_text("{}")
    with pytest.raises(ModelError, match="does not hold the recipe"):
        run(artefact, model, panel)


def test_limit_takes_the_first_queries(model: Path, panel: Path) -> None:
    report = run(model, model, panel, limit=2)
    assert (report.panels[0].queries, report.panels[0].pairs) == (2, 6)
    with pytest.raises(UsageError, match="at least 1 query"):
        run(model, model, panel, limit=0)


def test_an_unknown_gate_is_refused_before_anything_is_loaded(panel: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(UsageError, match="Unknown metric 'bleu'"):
        run(tmp_path, tmp_path, panel, recipe=recipe(tmp_path, "  bleu: {min: 1}"))


def test_a_text_model_refuses_a_picture_panel_by_item(panel: Path, tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "text")
    with pytest.raises(UsageError, match=r"Panel balls, query 'q1': item 'd2' holds a picture"):
        run(text, text, panel)


def test_another_family_or_task_than_the_references_is_a_verdict_and_nothing_is_scored(
    model: Path, panel: Path, tmp_path: Path
) -> None:
    text = tiny.write_text(tmp_path / "text")
    for artefact, reference in ((text, model), (model, text)):
        report = run(artefact, reference, panel, panels=())
        assert (report.verdict, report.panels) == (Verdict.FAIL, ())
        (finding,) = report.stages[0].findings
        assert (report.stages[0].name, finding.code) == ("structure", "other-architecture")
        assert "Qwen3ForCausalLM" in finding.sentence
        assert "Qwen3VL" in finding.sentence
    folders = []
    for name, kind in (("r", "x.LogitScore"), ("e", "x.Pooling")):
        folders.append(Path(shutil.copytree(model, tmp_path / name)))
        (folders[-1] / "modules.json").write_text(json.dumps([{"type": kind}]))
    report = run(folders[0], folders[1], panel, task=None)
    assert report.verdict is Verdict.FAIL
    assert report.stages[0].findings[0].code == "other-task"
    assert "rerank (modules.json (LogitScore)); the reference declares embed" in report.stages[0].findings[0].sentence
    with pytest.raises(UsageError, match="reranker or an embedder"):
        run(model, model, panel, task=None)
    assert run(model, folders[0], panel, task=None).task_source == "modules.json (LogitScore)"


@pytest.mark.parametrize("source", ["built-in", "a copy under another name"])
def test_a_real_model_on_coloured_shapes_is_inconclusive_and_a_loss_there_still_fails(
    model: Path, noisy: Path, tmp_path: Path, source: str
) -> None:
    panel = find_panel("demo-text")
    if source != "built-in":
        panel = tmp_path / "mine.jsonl"
        panel.write_bytes(find_panel("demo-text").read_bytes().partition(b"\n")[2])
    report = run(model, model, panel, limit=3, recipe=recipe(tmp_path, "  log_odds_rmse: {max: 100}"))
    assert report.verdict is Verdict.INCONCLUSIVE
    stages = {stage.name: stage for stage in report.stages}
    assert stages["panels"].outcome.value == "inconclusive"
    assert "coloured shapes" in stages["panels"].summary
    assert "--panel YOUR.jsonl" in stages["panels"].summary
    assert {gate.outcome.value for gate in report.gates} == {"inconclusive"}
    assert report.gates[0].reason.endswith("is made for the demo models")
    tight = recipe(tmp_path, "  log_odds_rmse: {max: 1.0e-6}")
    assert run(noisy, model, panel, limit=3, recipe=tight).verdict is Verdict.FAIL


def test_a_real_model_is_scored_on_real_texts_and_a_demo_model_on_its_own_panels(model: Path, tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "text")
    demo = resources.demo_model("qtool-demo-reranker")
    copy = Path(shutil.copytree(demo, tmp_path / "renamed"))
    chosen = {
        folder: open_case(VerifyOptions(artefact=str(folder), reference=str(folder), task=Task.RERANK, limit=1))
        for folder in (text, model, demo, copy)
    }
    assert {folder: case.options.panels for folder, case in chosen.items()} == {
        text: ("retrieval-text",),
        model: ("retrieval-text", "retrieval-image"),
        demo: ("demo-text", "demo-image", "demo-mixed"),
        copy: ("demo-text", "demo-image", "demo-mixed"),
    }
    assert not any(case.undecided for case in chosen.values())


def test_the_report_says_when_with_what_and_from_where(model: Path, panel: Path, tmp_path: Path) -> None:
    options = VerifyOptions(
        artefact=str(model), reference=str(model), panels=(str(panel),), task=Task.RERANK, device="cpu",
        noise_queries=0, output=tmp_path / "out", use_cache=False,
    )  # fmt: skip
    first = verify(options, command="qtool verify X")
    (tmp_path / "out" / "report.json").unlink()
    again = verify(options, command="qtool verify X")
    assert (again.command, again.started >= first.started > "2026") == ("qtool verify X", True)
    assert [(each.role, each.asked, each.kept) for each in first.answers] == [("artefact", 12, 0), ("reference", 12, 0)]
    assert [(each.role, each.asked, each.kept) for each in again.answers] == [("artefact", 0, 12), ("reference", 0, 12)]
    assert (
        first.artefact.nbytes
        == first.reference.nbytes
        == sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    )


def test_how_long_scoring_takes_is_said_once_where_it_is_long(
    model: Path, panel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.verify.collect._WORTH_SAYING", 0.0)
    monkeypatch.setattr("qtool.verify.collect._RATE_SECONDS", 0.0)
    lines: list[str] = []
    options = VerifyOptions(
        artefact=str(model), reference=str(model), panels=(str(panel),), task=Task.RERANK, device="cpu",
        noise_queries=0, use_cache=False,
    )  # fmt: skip
    verify(options, status=lines.append)
    estimates = [line for line in lines if " left for 12 answers; --limit N takes the first N queries" in line]
    assert [line.partition(":")[0] for line in estimates] == ["scores of the artefact", "scores of the reference"]


def test_a_truncated_artefact_fails_the_structure_and_a_truncated_reference_is_an_error(
    model: Path, panel: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    report = run(folder, model, panel)
    assert (report.verdict, report.stages[0].name, report.stages[0].outcome.value) == (
        Verdict.FAIL,
        "structure",
        "fail",
    )
    with pytest.raises(ModelError, match="is truncated") as caught:
        run(model, folder, panel)
    assert caught.value.hint == "Download or copy it again."


def test_each_stage_is_reported_as_it_ends_also_where_scoring_ends_in_an_error(
    model: Path, panel: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "nan")
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, folder / "model.safetensors")
    options = VerifyOptions(
        artefact=str(folder),
        reference=str(model),
        panels=(str(panel),),
        task=Task.RERANK,
        device="cpu",
        noise_queries=0,
    )
    lines: list[str] = []
    with pytest.raises(ModelError, match="not a finite number"):
        verify(options, status=lines.append)
    assert [line.partition(",")[0].partition(" in ")[0] for line in lines] == ["structure: pass", "prompt: pass"]
    lines.clear()
    verify(replace(options, artefact=str(model)), status=lines.append)
    assert [line.partition(":")[0] for line in lines] == ["structure", "prompt", "scores", "ranking"]


def test_panels_are_files_or_built_in_names(model: Path, panel: Path) -> None:
    with pytest.raises(UsageError, match="Unknown panel 'demo-taste'"):
        find_panel("demo-taste")
    assert find_panel("./mine.jsonl") == Path("mine.jsonl")
    with pytest.raises(UsageError, match="Two panels are named 'balls'"):
        verify(VerifyOptions(artefact=str(model), reference=str(model), panels=(str(panel),) * 2, task=Task.RERANK))


def test_the_report_is_json_and_a_table_with_every_promised_column(
    model: Path, noisy: Path, panel: Path, tmp_path: Path
) -> None:
    gates = "  log_odds_rmse: {max: 0.5}\n  kendall_tau: {min: 1.1}\n  cosine_p1: {min: 0.9}"
    report = run(noisy, model, panel, recipe=recipe(tmp_path, gates))
    loaded = json.loads(report.to_json())
    assert next(iter(loaded)) == "schema_version"
    assert loaded["schema_version"] == 3
    assert loaded["verdict"] == "fail"
    assert loaded["panels"][0]["metrics"] == dict(report.panels[0].metrics)
    assert loaded["gates"][1]["outcome"] == "fail"
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w", encoding="utf-8"))
    console.print(render_console(report))
    console.file.close()
    text = console.export_text()
    for phrase in ("log_odds_rmse", "kendall_tau", "Worst pairs of balls", "[red", "≤ 0.5", "is below 1.1"):
        assert phrase in text
    assert "FAIL: 1 of 2 gates failed on 12 pairs, 1 skipped." in text
