"""The two JSON descriptions by which engines recognise a ModelOpt checkpoint.

Rule: they equal what ModelOpt's exporter writes, since vLLM and SGLang parse them field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qtool.quantization.plan import QuantizationPlan

MODELOPT_LAYOUT: Final = "0.47.0"
"""The ModelOpt release whose layout is written. Engines look for its name; `qtool.json` says who did the work."""


def hf_quant_config(plan: QuantizationPlan) -> dict[str, Any]:
    """The contents of hf_quant_config.json."""
    return {
        "producer": {"name": "modelopt", "version": MODELOPT_LAYOUT},
        "quantization": {
            "quant_algo": plan.recipe.scheme,
            "kv_cache_quant_algo": None,
            "group_size": plan.recipe.block_size,
            "exclude_modules": list(plan.exclude_modules),
        },
    }


def quantized_config(plan: QuantizationPlan) -> Mapping[str, Any]:
    """The source's config.json with `quantization_config`, without which vLLM takes the weights for unquantized."""
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": plan.recipe.block_size}
    return {
        **plan.detection.config,
        "quantization_config": {
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": list(plan.exclude_modules),
            "quant_algo": plan.recipe.scheme,
            "producer": {"name": "modelopt", "version": MODELOPT_LAYOUT},
            "quant_method": "modelopt",
        },
    }
