"""Reports made by hand: a whole one, an empty one, a hostile one."""

from __future__ import annotations

from dataclasses import replace

from qtool.checks.findings import Finding, Severity
from qtool.checks.stage import Outcome, RederivedFile, Stage, TensorError
from qtool.verify.compare import thumbnail
from qtool.verify.gates import GateResult, Verdict
from qtool.verify.metrics import Interval
from qtool.verify.report import NoiseFloor, PairDelta, PanelReport, Report, Side

PAIR = PairDelta("q1", "d1", "which ball?", "a red ball", 2.0, "image", 3.25, 3.0, -0.25)


def side(name: str) -> Side:
    return Side(name, "transformers 5", "float32 on cpu", "a" * 64, "b" * 64)


def panel(name: str = "balls", **changes) -> PanelReport:
    metrics = {"log_odds_rmse": 0.0353, "kendall_tau": 0.986, "log_odds_bias": -1.5e-05}
    report = PanelReport(
        name, "c" * 64, "CC0-1.0", "mixed", 4, 3, metrics, (PAIR,),
        {"log_odds_rmse": Interval(0.0312, 0.0399)},
        {"text": {"log_odds_rmse": 0.03, "log_odds_p95": 0.07}, "image": {"log_odds_rmse": 0.04}},
        ((-5.0, -4.875), (0.0, 0.0), (3.25, 3.0)),
    )  # fmt: skip
    return replace(report, **changes)


def whole() -> Report:
    """A report that has every part, and fails."""
    gates = (
        GateResult(
            "log_odds_rmse", "balls", 0.0353, Interval(0.0312, 0.0399), None, 0.03, Outcome.FAIL, "0.0353 is above 0.03"
        ),
        GateResult("kendall_tau", "balls", 0.986, None, 0.9, None, Outcome.PASS, "0.986 is within bounds"),
        GateResult("cosine_p1", "balls", None, None, 0.99, None, Outcome.SKIPPED, "no metric of the task rerank"),
    )
    stages = (
        Stage("structure", Outcome.PASS, "13 tensors", (), 0.25),
        Stage("prompt", Outcome.INCONCLUSIVE, "the server shows no token ids"),
        Stage("noise", Outcome.SKIPPED, "not asked for"),
        Stage("weights", Outcome.FAIL, "one is wrong", (Finding("far", Severity.BROKEN, "Too far.", "qtool x"),), 2),
    )
    weights = tuple(
        TensorError(f"model.layers.{n}.{part}.weight", "NVFP4", 0.09 + n / 100, 0.11)
        for n in range(4)
        for part in ("self_attn.q_proj", "mlp.up_proj", "other")
    )
    return Report(
        side("out/model-NVFP4"), side("org/model"), "rerank", "modules.json", "tiny", {"limit": None, "dtype": "float32", "task": "rerank"}, stages, (panel(),), gates,
        Verdict.FAIL, 12.5, {"torch": "2.13.0", "gone": None}, NoiseFloor("bfloat16", 3, 0.01, 0.02, 0.03, 0.04), weights,
        (RederivedFile("a.safetensors", "1" * 64, "1" * 64), RederivedFile("b.safetensors", "1" * 64, None)),
    )  # fmt: skip


def structure_only() -> Report:
    """A report of a run that scored nothing."""
    stages = (Stage("structure", Outcome.PASS, "13 tensors"),)
    bare = replace(whole(), stages=stages, panels=(), gates=(), noise=None, weights=(), rederived=(), recipe="")
    return replace(bare, verdict=Verdict.PASS)


def empty() -> Report:
    """A report without a single part."""
    return replace(structure_only(), stages=(), verdict=Verdict.UNGATED, versions={})


def embedder() -> Report:
    """A report whose panel has cosines, and numbers of no extent."""
    metrics = {"cosine_p1": 1.0, "similarity_rmse": 0.0, "a_metric_of_tomorrow": 1234.5}
    same = panel(metrics=metrics, scores=((0.5, 0.5), (0.5, 0.5)), worst=(), by_modality={}, intervals={})
    return replace(
        whole(), task="embed", panels=(same, panel("second", scores=())), noise=None, verdict=Verdict.UNGATED
    )


HOSTILE = "</title></style><script>alert(1)</script><img src=http://x.example/a onerror=b> \"'| `x` *y* [z](u) {{7*7}} \x1b[31m\x00\ud800\nq"


def hostile() -> Report:
    """A report in which every text is an attack."""
    picture = 'data:image/png;base64,AAAA" onerror="alert(1)'
    bad = replace(PAIR, query_id=HOSTILE, document_id=HOSTILE, query=HOSTILE, document=HOSTILE, modality=HOSTILE)
    bad = replace(bad, pictures=(picture, "http://x.example/p.png", "javascript:alert(1)", thumbnail_of_red()))
    report = whole()
    return replace(
        report,
        artefact=replace(report.artefact, name=HOSTILE, engine=HOSTILE, numbers=HOSTILE),
        reference=replace(report.reference, name=HOSTILE, sha256=None),
        task_source=HOSTILE,
        recipe=HOSTILE,
        stages=tuple(
            replace(each, name=HOSTILE, summary=HOSTILE, findings=(Finding(HOSTILE, Severity.NOTE, HOSTILE, HOSTILE),))
            for each in report.stages
        ),
        panels=(panel(HOSTILE, license=HOSTILE, worst=(bad,), by_modality={HOSTILE: {"log_odds_rmse": 0.1}}),),
        gates=tuple(replace(gate, panel=HOSTILE, reason=HOSTILE) for gate in report.gates),
        versions={HOSTILE: HOSTILE},
        noise=NoiseFloor(HOSTILE, 3, 0.01, 0.02, 0.03, 0.04),
        weights=tuple(replace(each, tensor=HOSTILE + ".1." + HOSTILE, format=HOSTILE) for each in report.weights),
        rederived=(RederivedFile(HOSTILE, HOSTILE, HOSTILE),),
    )


def thumbnail_of_red() -> str:
    from PIL import Image

    return thumbnail(Image.new("RGB", (640, 320), "red"))


ALL = {"whole": whole, "structure": structure_only, "empty": empty, "embedder": embedder, "hostile": hostile}
