"""Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.

The public API in one screen; every name is imported when first used, so that `import qtool` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qtool.checks.inspect import inspect
    from qtool.checks.report import InspectionReport
    from qtool.errors import QtoolError as QtoolError
    from qtool.export.convert import convert_gguf
    from qtool.export.gguf_plan import ConvertOptions
    from qtool.export.quantize import QuantizeOptions, quantize
    from qtool.export.repair import RepairOptions, repair_gguf
    from qtool.scoring.embed import EmbedOptions, Texts, embed
    from qtool.scoring.runtime import RuntimeOptions as RuntimeOptions
    from qtool.scoring.runtime import open_runtime as open_runtime
    from qtool.scoring.score import PanelChoice, ScoreOptions, score
    from qtool.verify.case import VerifyOptions
    from qtool.verify.merge import merge_reports
    from qtool.verify.run import verify

__version__ = "0.1.0"

_HOMES: Final = {
    "ConvertOptions": "qtool.export.gguf_plan",
    "EmbedOptions": "qtool.scoring.embed",
    "InspectionReport": "qtool.checks.report",
    "PanelChoice": "qtool.scoring.score",
    "QtoolError": "qtool.errors",
    "QuantizeOptions": "qtool.export.quantize",
    "RepairOptions": "qtool.export.repair",
    "RuntimeOptions": "qtool.scoring.runtime",
    "ScoreOptions": "qtool.scoring.score",
    "Texts": "qtool.scoring.embed",
    "VerifyOptions": "qtool.verify.case",
    "convert_gguf": "qtool.export.convert",
    "embed": "qtool.scoring.embed",
    "inspect": "qtool.checks.inspect",
    "open_runtime": "qtool.scoring.runtime",
    "merge_reports": "qtool.verify.merge",
    "quantize": "qtool.export.quantize",
    "repair_gguf": "qtool.export.repair",
    "score": "qtool.scoring.score",
    "verify": "qtool.verify.run",
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
