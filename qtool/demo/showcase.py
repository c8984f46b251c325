"""`qtool demo`: quantize the built-in models, verify them, and write the reports, as `qtool quantize` and `verify` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group, RenderableType
from rich.rule import Rule
from typing_extensions import override

from qtool import api
from qtool.console import unwrapped
from qtool.export.quantize import QuantizationSummary, quantization_table
from qtool.extras import require_extra
from qtool.progress import ignore
from qtool.reporting.console import render_console
from qtool.results import Result
from qtool.verify.report import Report

if TYPE_CHECKING:
    from rich.text import Text

MODELS: Final = ("qtool-demo-reranker", "qtool-demo-embedder")
_NDCG: Final = ("ndcg10_reference", "ndcg10_artefact")


@dataclass(frozen=True, repr=False)
class Showcase(Result):
    """What became of each demo model, by its name."""

    outputs: Mapping[str, Path]
    reports_in: Mapping[str, Path]
    summaries: Mapping[str, QuantizationSummary]
    reports: Mapping[str, Report]

    @property
    def passed(self) -> bool:
        """Whether every model kept its gates."""
        return all(report.passed for report in self.reports.values())

    @property
    @override
    def headline(self) -> str:
        verdicts = [f"{name} {report.verdict.value}" for name, report in self.reports.items()]
        return f"{', '.join(verdicts)}."

    @override
    def records(self) -> list[dict[str, Any]]:
        return [{"model": name, **row} for name, report in self.reports.items() for row in report.records()]

    @override
    def to_dict(self) -> dict[str, Any]:
        models = {
            name: {
                "quantize": self.summaries[name].to_dict(),
                "verify": self.reports[name].to_dict(),
                "report": str(self.reports_in[name] / "report.html"),
            }
            for name in self.reports
        }
        return {"schema_version": 1, "models": models}

    def summary(self) -> RenderableType:
        """A line for each model, and where the reports lie."""
        where = ", ".join(str(folder / "report.html") for folder in self.reports_in.values())
        return Group(*map(self._line, self.reports), unwrapped(f"Reports: {where}"))

    def details(self) -> RenderableType:
        """The tables of each quantization and verification, then the summary."""
        parts: list[RenderableType] = []
        for name, report in self.reports.items():
            table = quantization_table(self.summaries[name], name, self.outputs[name], dry_run=False)
            parts += [Rule(f"{name}: quantize"), table, Rule(f"{name}: verify"), render_console(report)]
        return Group(*parts, Rule("summary"), self.summary())

    def _line(self, name: str) -> Text:
        report, made = self.reports[name], self.summaries[name]
        pairs = sum(panel.pairs for panel in report.panels)
        before, after = (sum(p.metrics[name] for p in report.panels) / len(report.panels) for name in _NDCG)
        return unwrapped(
            f"{name}: {report.verdict.value.upper()}, {made.bits_per_weight:.2f} bits per weight, "
            f"nDCG@10 {before:.3f} before and {after:.3f} after, on {pairs:,} pairs"
        )


def showcase(folder: Path, show_command: Callable[[str], None] = ignore) -> Showcase:
    """Quantize the demo models into `folder`, replacing an earlier demo's, and verify them on the built-in panels.

    `show_command` is called before each step with the command that does the same.
    """
    require_extra("score", "The demo")
    outputs = {name: folder / f"{name}-NVFP4" for name in MODELS}
    reports_in = {name: folder / f"{name}-report" for name in MODELS}
    summaries, reports = {}, {}
    for name, output in outputs.items():
        show_command(f"qtool quantize {name} -o {output} --force")
        summaries[name] = api.quantize(name, output=output, force=True)
        show_command(f"qtool verify {output} --reference {name} -o {reports_in[name]} --force")
        reports[name] = api.verify(output, reference=name, output=reports_in[name], force=True)
    return Showcase(outputs, reports_in, summaries, reports)
