"""Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.

The public API in one screen; every name is imported when first used, so that `import qtool` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qtool.errors import QtoolError as QtoolError
    from qtool.quantize.job import QuantizeOptions as QuantizeOptions
    from qtool.quantize.run import quantize as quantize
    from qtool.verify.run import VerifyOptions as VerifyOptions
    from qtool.verify.run import verify as verify

_HOMES: Final = {
    "QtoolError": "qtool.errors",
    "QuantizeOptions": "qtool.quantize.job",
    "VerifyOptions": "qtool.verify.run",
    "quantize": "qtool.quantize.run",
    "verify": "qtool.verify.run",
}

__all__ = ["QtoolError", "QuantizeOptions", "VerifyOptions", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
