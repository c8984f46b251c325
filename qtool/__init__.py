"""Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.

The public API in one screen; every name is imported when first used, so that `import qtool` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qtool.errors import QtoolError as QtoolError
    from qtool.quantization.job import QuantizeOptions as QuantizeOptions
    from qtool.quantization.run import quantize as quantize
    from qtool.verification.run import VerifyOptions as VerifyOptions
    from qtool.verification.run import verify as verify

_HOMES: Final = {
    "QtoolError": "qtool.errors",
    "QuantizeOptions": "qtool.quantization.job",
    "VerifyOptions": "qtool.verification.run",
    "quantize": "qtool.quantization.run",
    "verify": "qtool.verification.run",
}

__all__ = ["QtoolError", "QuantizeOptions", "VerifyOptions", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
