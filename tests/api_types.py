"""The public API as a user's strictly typed code calls it; mypy checks this file, and nothing runs it."""

from __future__ import annotations

from pathlib import Path

import qtool
from qtool import QuantizeOptions, Task, UsageError, verify


def keywords() -> list[dict[str, object]]:
    summary: qtool.QuantizationSummary = qtool.quantize("org/model", output="out", task="embed", max_shard_size="5GB")
    conversion: qtool.ConversionSummary = qtool.convert_gguf(Path("model"), output=Path("out"), outtypes=["f16"])
    repair: qtool.RepairSummary = qtool.repair_gguf("broken.gguf", output="fixed.gguf", task=Task.RERANK)
    inspection: qtool.InspectionReport = qtool.inspect(Path("model.gguf"), task=None)
    scores: qtool.Scores = qtool.score("model", panel="demo-text", limit=2, mmproj="mmproj.gguf", progress=None)
    embeddings: qtool.Embeddings = qtool.embed("model", texts=["a", "b"], dim=64)
    report: qtool.Report = verify(
        "out", reference="org/model", panels=["demo-text", Path("own.jsonl")], output="report"
    )
    merged: qtool.Report = qtool.merge_reports(["a", Path("b")], output="whole")
    comparison: qtool.Comparison = qtool.compare(["a", Path("b")], baseline="a", fail_if_worse="kendall_tau")
    results = (comparison, summary, conversion, repair, inspection, scores, embeddings, report, merged)
    return [result.to_dict() for result in results]


def options() -> qtool.Scorer:
    qtool.quantize(QuantizeOptions(model="org/model", output=Path("out"), task=Task.EMBED))
    qtool.verify(qtool.VerifyOptions(artefact="out", reference="org/model"))
    return qtool.open_runtime("model", qtool.RuntimeOptions(dtype="bfloat16"))


def count(done: int, total: int) -> None:
    pass


def stages(stage: str, done: int, total: int) -> None:
    pass


def progress() -> None:
    qtool.quantize("org/model", progress=count)
    qtool.score("model", panel="own.jsonl", progress=stages)


def wrong() -> str:
    try:
        qtool.quantize(3)  # type: ignore[arg-type]
        qtool.quantize("org/model", task="classify")  # type: ignore[arg-type]
        qtool.quantize("org/model", "out")  # type: ignore[call-arg]
        qtool.score("model", panels=["demo-text"])  # type: ignore[call-arg]
        qtool.inspect("model", progress=count)  # type: ignore[arg-type]
    except UsageError as error:
        return f"{error.message} {error.hint} {error.exit_code}"
    return ""
