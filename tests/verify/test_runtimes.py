"""One artefact through the engines that people serve it with, each against the same reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool import resources
from qtool.errors import UsageError
from qtool.reporting.run import verify
from qtool.reporting.words import headline
from qtool.scoring.llama_cpp import server
from qtool.scoring.llama_cpp.server import LlamaCppOptions, Pooling, start_server
from qtool.scoring.transformers import runtime
from qtool.verify.case import VerifyOptions
from qtool.verify.gates import Verdict
from qtool.verify.report import Report
from tests.scoring.gguf_files import gguf_of, projector_of

pytest.importorskip("xllamacpp")

RERANKER = resources.demo_model("qtool-demo-reranker")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


def run(artefact: str, panels: tuple[str, ...], **options: object) -> Report:
    chosen = {"limit": 2, "noise_queries": 1, "device": "cpu", **options}
    return verify(VerifyOptions(artefact=artefact, reference="qtool-demo-reranker", panels=panels, **chosen))


def outcomes(report: Report) -> dict[str, str]:
    return {stage.name: stage.outcome.value for stage in report.stages}


def test_a_gguf_file_is_verified_from_structure_to_pictures(folder: Path) -> None:
    gguf, mmproj = gguf_of(RERANKER, "f16", folder), projector_of(RERANKER, folder)
    report = run(str(gguf), ("demo-text", "demo-image"), mmproj=mmproj, weights=True)
    assert outcomes(report) == {
        "structure": "pass", "weights": "pass", "prompt": "pass", "noise": "pass", "scores": "pass",
        "ranking": "inconclusive",
    }  # fmt: skip
    assert report.recipe == "nvfp4-w4a16"
    assert report.artefact.engine.startswith("llama.cpp")
    # Measured: 0.0008 on texts, 0.0009 on pictures.
    assert all(panel.metrics["log_odds_max"] < 0.01 for panel in report.panels)
    assert set(report.panels[1].by_modality) == {"image"}
    assert report.panels[1].worst[0].pictures[0].startswith("data:image/")


def test_a_gguf_file_is_loaded_once_and_closed_before_the_reference_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    start, load, close = server.start_server, runtime.load, server.Context.close
    monkeypatch.setattr(server, "start_server", lambda *given: events.append("load file") or start(*given))
    monkeypatch.setattr(server.Context, "close", lambda self: events.append("close file") or close(self))
    monkeypatch.setattr(runtime, "load", lambda *given: events.append("load reference") or load(*given))
    run(str(gguf_of(RERANKER, "f16", folder)), ("demo-text",), noise_queries=0, use_cache=False)
    assert events == ["load file", "close file", "load reference"]


def test_a_running_server_is_verified_by_its_scores(folder: Path) -> None:
    running = start_server(gguf_of(RERANKER, "f16", folder), None, Pooling.RANK, 1024, LlamaCppOptions(threads=1))
    report = run(running.listening_address, ("demo-text",))
    assert outcomes(report)["structure"] == "skipped"
    assert outcomes(report)["scores"] == "pass"
    assert report.artefact.sha256 is None
    assert report.artefact.engine.startswith("llama-server")
    assert report.panels[0].metrics["log_odds_max"] < 0.01


@pytest.mark.parametrize(
    ("runtime", "why"), [("file", "there is no fitting projector beside model.gguf"), ("server", "takes texts")]
)
def test_without_named_panels_those_that_the_runtime_cannot_read_are_left_out(
    folder: Path, runtime: str, why: str
) -> None:
    gguf = gguf_of(RERANKER, "f16", folder)
    running = start_server(gguf, None, Pooling.RANK, 1024, LlamaCppOptions(threads=1)) if runtime == "server" else None
    report = run(running.listening_address if running else str(gguf), ())
    assert [panel.name for panel in report.panels] == ["demo-text"]
    assert report.settings["panel_sources"] == ["demo-text"]
    (stage,) = (stage for stage in report.stages if stage.name == "panels")
    assert stage.outcome.value == "inconclusive"
    assert report.verdict is Verdict.INCONCLUSIVE
    assert headline(report).startswith("panels is inconclusive; ")
    assert stage.summary.startswith("demo-image, demo-mixed left out: ")
    assert why in stage.summary


def test_a_projector_beside_a_file_brings_the_panels_of_pictures_back(folder: Path) -> None:
    mmproj = projector_of(RERANKER, folder)
    report = run(str(gguf_of(RERANKER, "f16", folder)), (), mmproj=mmproj, limit=1)
    assert [panel.name for panel in report.panels] == ["demo-text", "demo-image", "demo-mixed"]
    assert "panels" not in outcomes(report)


def test_a_served_file_with_llama_cpps_own_prompt_is_named(folder: Path) -> None:
    gguf = gguf_of(RERANKER, "f16", folder, prompt="llamacpp")
    found = {finding.code for stage in run(str(gguf), ("demo-text",)).stages for finding in stage.findings}
    assert "gguf-wrong-rerank-template" in found
    running = start_server(gguf, None, Pooling.RANK, 1024, LlamaCppOptions(threads=1))
    report = run(running.listening_address, ("demo-text",))
    assert outcomes(report)["prompt"] == "fail"
    assert any("text" in finding.sentence for stage in report.stages for finding in stage.findings)


def test_a_served_reranker_is_refused_beside_an_embedder_before_anything_is_scored(folder: Path) -> None:
    running = start_server(gguf_of(RERANKER, "f16", folder), None, Pooling.RANK, 1024, LlamaCppOptions(threads=1))
    options = VerifyOptions(
        artefact=running.listening_address, reference="qtool-demo-embedder", panels=("demo-text",), limit=1
    )
    with pytest.raises(UsageError, match=r"serves a reranker \(as llama-server reports\), but the task is embed"):
        verify(options)
