"""`qtool demo`: the main job, from a model whose scores mean something to a verdict, on the built-in models.

Rule: it does nothing that a user could not do with `qtool quantize` and `qtool verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.rule import Rule

from qtool.export.quantize import QuantizationSummary, QuantizeOptions, quantization_table, quantize
from qtool.extras import require_extra
from qtool.progress import StageProgress
from qtool.reporting.console import render_console
from qtool.verify.case import VerifyOptions
from qtool.verify.report import Report
from qtool.verify.run import verify

MODELS: Final = ("qtool-demo-reranker", "qtool-demo-embedder")


@dataclass(frozen=True)
class Showcase:
    """What became of each demo model."""

    outputs: Mapping[str, Path]
    summaries: Mapping[str, QuantizationSummary]
    reports: Mapping[str, Report]

    @property
    def passed(self) -> bool:
        """Whether every model kept its gates."""
        return all(report.passed for report in self.reports.values())

    def to_json(self) -> Mapping[str, Any]:
        """Both steps of each model, as `qtool quantize --json` and `qtool verify --json` give them."""
        models = {
            name: {"quantize": self.summaries[name].to_json(), "verify": self.reports[name].to_dict()}
            for name in self.reports
        }
        return {"schema_version": 1, "models": models}

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        for name, report in self.reports.items():
            parts += [
                Rule(f"{name}: quantize"),
                quantization_table(self.summaries[name], self.outputs[name], dry_run=False),
            ]
            parts += [Rule(f"{name}: verify"), render_console(report)]
        return Group(*parts)


def showcase(folder: Path, say: Callable[[str], None], progress: StageProgress) -> Showcase:
    """Quantize the demo models into `folder` (replacing an earlier demo's) and verify them on the built-in panels."""
    require_extra("score", "The demo")
    outputs = {name: folder / f"{name}-NVFP4" for name in MODELS}
    summaries, reports = {}, {}
    for name, output in outputs.items():
        say(f"qtool quantize {name} --recipe nvfp4-w4a16 -o {output} --force")
        summaries[name] = quantize(QuantizeOptions(name, output, force=True))
        say(f"qtool verify {output} --reference {name}")
        options = VerifyOptions(str(output), name)
        reports[name] = verify(options, _named(name, progress))
    return Showcase(outputs, summaries, reports)


def _named(model: str, progress: StageProgress) -> StageProgress:
    return lambda stage, done, total: progress(f"{model}, {stage}", done, total)
