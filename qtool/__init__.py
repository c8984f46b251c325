"""Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.

The public API in one screen; every name is imported when first used, so that `import qtool` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qtool.convert.options import ConvertOptions as ConvertOptions
    from qtool.convert.repair import RepairOptions as RepairOptions
    from qtool.convert.repair import repair_gguf as repair_gguf
    from qtool.convert.run import convert_gguf as convert_gguf
    from qtool.errors import QtoolError as QtoolError
    from qtool.inspection.report import InspectionReport as InspectionReport
    from qtool.inspection.run import inspect as inspect
    from qtool.quantization.job import QuantizeOptions as QuantizeOptions
    from qtool.quantization.run import quantize as quantize
    from qtool.verification.case import VerifyOptions as VerifyOptions
    from qtool.verification.run import verify as verify

_HOMES: Final = {
    "InspectionReport": "qtool.inspection.report",
    "ConvertOptions": "qtool.convert.options",
    "QtoolError": "qtool.errors",
    "QuantizeOptions": "qtool.quantization.job",
    "RepairOptions": "qtool.convert.repair",
    "VerifyOptions": "qtool.verification.case",
    "convert_gguf": "qtool.convert.run",
    "inspect": "qtool.inspection.run",
    "quantize": "qtool.quantization.run",
    "repair_gguf": "qtool.convert.repair",
    "verify": "qtool.verification.run",
}

__all__ = [
    "ConvertOptions",
    "InspectionReport",
    "QtoolError",
    "QuantizeOptions",
    "RepairOptions",
    "VerifyOptions",
    "convert_gguf",
    "inspect",
    "quantize",
    "repair_gguf",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
