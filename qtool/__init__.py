"""Quantize, convert and verify Qwen3 and Qwen3-VL rerankers and embedders.

The public API in one screen; every name is imported when it is first used, so that `import qtool` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from qtool.api import calibrate as calibrate
    from qtool.api import compare as compare
    from qtool.api import convert_gguf as convert_gguf
    from qtool.api import embed as embed
    from qtool.api import inspect as inspect
    from qtool.api import merge_reports as merge_reports
    from qtool.api import open_runtime as open_runtime
    from qtool.api import quantize as quantize
    from qtool.api import repair_gguf as repair_gguf
    from qtool.api import score as score
    from qtool.api import tune as tune
    from qtool.api import verify as verify
    from qtool.api import verify_all as verify_all
    from qtool.arch.spec import Task as Task
    from qtool.calibration.calibrate import CalibrateOptions as CalibrateOptions
    from qtool.calibration.calibrate import Calibration as Calibration
    from qtool.calibration.tune import Tuned as Tuned
    from qtool.calibration.tune import TuneOptions as TuneOptions
    from qtool.checks.report import InspectionReport as InspectionReport
    from qtool.errors import ModelError as ModelError
    from qtool.errors import NetworkError as NetworkError
    from qtool.errors import QtoolError as QtoolError
    from qtool.errors import SetupError as SetupError
    from qtool.errors import UsageError as UsageError
    from qtool.export.convert import ConversionSummary as ConversionSummary
    from qtool.export.gguf_plan import ConvertOptions as ConvertOptions
    from qtool.export.quantize import QuantizationSummary as QuantizationSummary
    from qtool.export.quantize import QuantizeOptions as QuantizeOptions
    from qtool.export.repair import RepairOptions as RepairOptions
    from qtool.export.repair import RepairSummary as RepairSummary
    from qtool.inputs.items import Item as Item
    from qtool.inputs.items import Pair as Pair
    from qtool.inputs.media import LocalAddress as LocalAddress
    from qtool.inputs.panels import PanelShard as PanelShard
    from qtool.reporting.several import Reports as Reports
    from qtool.scoring.embed import Embeddings as Embeddings
    from qtool.scoring.embed import EmbedOptions as EmbedOptions
    from qtool.scoring.embed import Texts as Texts
    from qtool.scoring.llama_cpp.server import LlamaCppOptions as LlamaCppOptions
    from qtool.scoring.runtime import RuntimeOptions as RuntimeOptions
    from qtool.scoring.score import PanelChoice as PanelChoice
    from qtool.scoring.score import ScoredPair as ScoredPair
    from qtool.scoring.score import ScoreOptions as ScoreOptions
    from qtool.scoring.score import Scores as Scores
    from qtool.scoring.scorer import Scorer as Scorer
    from qtool.verify.case import VerifyOptions as VerifyOptions
    from qtool.verify.gates import Verdict as Verdict
    from qtool.verify.paired import Comparison as Comparison
    from qtool.verify.report import Report as Report

__version__ = "0.1.0"

_MODULES: Final = {
    "qtool.api": (
        "calibrate",
        "compare",
        "convert_gguf",
        "embed",
        "inspect",
        "merge_reports",
        "open_runtime",
        "quantize",
        "repair_gguf",
        "score",
        "tune",
        "verify",
        "verify_all",
    ),
    "qtool.arch.spec": ("Task",),
    "qtool.calibration.calibrate": ("CalibrateOptions", "Calibration"),
    "qtool.calibration.tune": ("TuneOptions", "Tuned"),
    "qtool.checks.report": ("InspectionReport",),
    "qtool.errors": ("ModelError", "NetworkError", "QtoolError", "SetupError", "UsageError"),
    "qtool.export.convert": ("ConversionSummary",),
    "qtool.export.gguf_plan": ("ConvertOptions",),
    "qtool.export.quantize": ("QuantizationSummary", "QuantizeOptions"),
    "qtool.export.repair": ("RepairOptions", "RepairSummary"),
    "qtool.inputs.items": ("Item", "Pair"),
    "qtool.inputs.media": ("LocalAddress",),
    "qtool.inputs.panels": ("PanelShard",),
    "qtool.reporting.several": ("Reports",),
    "qtool.scoring.embed": ("EmbedOptions", "Embeddings", "Texts"),
    "qtool.scoring.llama_cpp.server": ("LlamaCppOptions",),
    "qtool.scoring.runtime": ("RuntimeOptions",),
    "qtool.scoring.score": ("PanelChoice", "ScoreOptions", "ScoredPair", "Scores"),
    "qtool.scoring.scorer": ("Scorer",),
    "qtool.verify.case": ("VerifyOptions",),
    "qtool.verify.gates": ("Verdict",),
    "qtool.verify.paired": ("Comparison",),
    "qtool.verify.report": ("Report",),
}
_HOMES: Final = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604 - the names stand in _MODULES


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qtool' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _VerifyPackage(ModuleType):
    """The package `qtool.verify`, which is called as the function of its name.

    Python sets a sub-package as an attribute of its parent once anything imports it, and so replaces the function.
    """

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function; its signature is the package's."""
        function: Callable[..., Any] = import_module("qtool.api").verify
        return function

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__wrapped__(*arguments, **keywords)


class _Package(ModuleType):
    """This package, which makes its sub-package `verify` callable when that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "verify" and isinstance(value, ModuleType):
            value.__class__ = _VerifyPackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
