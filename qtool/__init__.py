"""Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.

The public API in one screen; every name is imported when first used, so that `import qtool` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qtool.answers.embed import EmbedOptions as EmbedOptions
    from qtool.answers.embed import Texts as Texts
    from qtool.answers.embed import embed as embed
    from qtool.answers.panel import PanelChoice as PanelChoice
    from qtool.answers.score import ScoreOptions as ScoreOptions
    from qtool.answers.score import score as score
    from qtool.convert.options import ConvertOptions as ConvertOptions
    from qtool.convert.repair import RepairOptions as RepairOptions
    from qtool.convert.repair import repair_gguf as repair_gguf
    from qtool.convert.run import convert_gguf as convert_gguf
    from qtool.errors import QtoolError as QtoolError
    from qtool.inspection.report import InspectionReport as InspectionReport
    from qtool.inspection.run import inspect as inspect
    from qtool.quantization.job import QuantizeOptions as QuantizeOptions
    from qtool.quantization.run import quantize as quantize
    from qtool.scoring.runtime import RuntimeOptions as RuntimeOptions
    from qtool.scoring.runtime import open_runtime as open_runtime
    from qtool.verification.case import VerifyOptions as VerifyOptions
    from qtool.verification.merge import merge_reports as merge_reports
    from qtool.verification.run import verify as verify

_HOMES: Final = {
    "ConvertOptions": "qtool.convert.options",
    "EmbedOptions": "qtool.answers.embed",
    "InspectionReport": "qtool.inspection.report",
    "PanelChoice": "qtool.answers.panel",
    "QtoolError": "qtool.errors",
    "QuantizeOptions": "qtool.quantization.job",
    "RepairOptions": "qtool.convert.repair",
    "RuntimeOptions": "qtool.scoring.runtime",
    "ScoreOptions": "qtool.answers.score",
    "Texts": "qtool.answers.embed",
    "VerifyOptions": "qtool.verification.case",
    "convert_gguf": "qtool.convert.run",
    "embed": "qtool.answers.embed",
    "inspect": "qtool.inspection.run",
    "open_runtime": "qtool.scoring.runtime",
    "merge_reports": "qtool.verification.merge",
    "quantize": "qtool.quantization.run",
    "repair_gguf": "qtool.convert.repair",
    "score": "qtool.answers.score",
    "verify": "qtool.verification.run",
}

__all__ = [
    "ConvertOptions",
    "EmbedOptions",
    "InspectionReport",
    "PanelChoice",
    "QtoolError",
    "QuantizeOptions",
    "RepairOptions",
    "RuntimeOptions",
    "ScoreOptions",
    "Texts",
    "VerifyOptions",
    "convert_gguf",
    "embed",
    "inspect",
    "merge_reports",
    "open_runtime",
    "quantize",
    "repair_gguf",
    "score",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
