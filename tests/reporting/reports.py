"""Reports made by hand: a whole one, an empty one, a hostile one."""

from __future__ import annotations

from dataclasses import replace

from qtool.checks.findings import Finding, Severity
from qtool.checks.stage import Outcome, RederivedFile, Stage, TensorError
from qtool.verify.compare import thumbnail
from qtool.verify.gates import GateResult, Verdict
from qtool.verify.metrics import Interval
from qtool.verify.report import AnswerCount, NoiseFloor, PairDelta, PanelReport, Report, Side

PAIR = PairDelta(
    query_id="q1",
    document_id="d1",
    query="which ball?",
    document="a red ball",
    label=2.0,
    modality="image",
    reference=3.25,
    artefact=3.0,
    delta=-0.25,
)


def side(name: str, nbytes: int | None = None) -> Side:
    engine = {"engine": "transformers 5", "numbers": "float32 on cpu", "sha256": "a" * 64, "prompt_sha256": "b" * 64}
    return Side(name=name, nbytes=nbytes, **engine)


def noise(dtype: str) -> NoiseFloor:
    return NoiseFloor(dtype=dtype, pairs=3, p50=0.01, p95=0.02, p99=0.03, max=0.04)


def panel(name: str = "balls", **changes) -> PanelReport:
    report = PanelReport(
        name=name,
        sha256="c" * 64,
        license="CC0-1.0",
        modality="mixed",
        queries=4,
        pairs=3,
        metrics={"log_odds_rmse": 0.0353, "kendall_tau": 0.986, "log_odds_bias": -1.5e-05},
        worst=(PAIR,),
        intervals={"log_odds_rmse": Interval(0.0312, 0.0399)},
        by_modality={"text": {"log_odds_rmse": 0.03, "log_odds_p95": 0.07}, "image": {"log_odds_rmse": 0.04}},
        scores=((-5.0, -4.875), (0.0, 0.0), (3.25, 3.0)),
    )
    return replace(report, **changes)


def gate(metric: str, outcome: Outcome, reason: str, **changes) -> GateResult:
    nothing = {"value": None, "interval": None, "min": None, "max": None}
    return GateResult(metric=metric, panel="balls", outcome=outcome, reason=reason, **{**nothing, **changes})


def whole() -> Report:
    """A report that has every part, and fails."""
    gates = (
        gate(
            "log_odds_rmse",
            Outcome.FAIL,
            "0.0353 is above 0.03",
            value=0.0353,
            interval=Interval(0.0312, 0.0399),
            max=0.03,
        ),
        gate("kendall_tau", Outcome.PASS, "0.986 is within bounds", value=0.986, min=0.9),
        gate("cosine_p1", Outcome.SKIPPED, "not a metric of the task rerank", min=0.99),
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
        artefact=side("out/model-NVFP4", 1_500_000_000),
        reference=side("org/model", 4_000_000_000),
        task="rerank",
        task_source="modules.json",
        recipe="tiny",
        settings={"limit": None, "dtype": "float32", "task": "rerank"},
        stages=stages,
        panels=(panel(),),
        gates=gates,
        verdict=Verdict.FAIL,
        seconds=12.5,
        versions={"torch": "2.13.0", "gone": None},
        noise=noise("bfloat16"),
        weights=weights,
        rederived=(RederivedFile("a.safetensors", "1" * 64, "1" * 64), RederivedFile("b.safetensors", "1" * 64, None)),
        started="2026-11-24T12:00:00+00:00",
        command="qtool verify out/model-NVFP4 --reference org/model",
        answers=(AnswerCount(role="artefact", asked=3, kept=0), AnswerCount(role="reference", asked=1, kept=2)),
    )


def structure_only() -> Report:
    """A report of a run that scored nothing."""
    stages = (Stage("structure", Outcome.PASS, "13 tensors"),)
    bare = replace(
        whole(), stages=stages, panels=(), gates=(), noise=None, weights=(), rederived=(), recipe="", answers=()
    )
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
        command=HOSTILE,
        started=HOSTILE,
        answers=(AnswerCount(role=HOSTILE, asked=1, kept=0),),
        noise=noise(HOSTILE),
        weights=tuple(replace(each, tensor=HOSTILE + ".1." + HOSTILE, format=HOSTILE) for each in report.weights),
        rederived=(RederivedFile(HOSTILE, HOSTILE, HOSTILE),),
    )


def thumbnail_of_red() -> str:
    from PIL import Image

    return thumbnail(Image.new("RGB", (640, 320), "red"))


ALL = {"whole": whole, "structure": structure_only, "empty": empty, "embedder": embedder, "hostile": hostile}
