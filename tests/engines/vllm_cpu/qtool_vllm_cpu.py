"""What vLLM lacks to serve an NVFP4 checkpoint on a CPU; it finds this module by its entry points.

Only the matrix product is ours; configuration, loader, fusion of layers, prompts and endpoints are vLLM's own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import library


def declare_torchvision_operators() -> None:
    """Let torchvision be imported where its registry build, linked against CUDA, cannot load its operators.

    It registers shapes for two operators whether they exist or not. No model here calls them. vLLM takes the answer,
    None, as "no platform of mine".
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))
    except OSError:
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def register() -> None:
    """Give the kernel that vLLM insists on for W4A16 NVFP4, Marlin, a form for the CPU, and allow float32 beside it."""
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel as Kernel
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    ModelOptNvFp4Config.get_supported_act_dtypes = lambda _self: [torch.float32, torch.bfloat16]
    Kernel.is_supported = classmethod(lambda _cls, _capability=None: (True, None))
    Kernel.process_weights_after_loading = _dequantize
    Kernel.apply_weights = _apply


def _dequantize(_kernel: object, layer: torch.nn.Module) -> None:
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    scale = layer.weight_global_scale
    layer.dequantized = dequantize_to_dtype(
        layer.weight.data, layer.weight_scale.data, scale, torch.float32, swizzle=False
    )


def _apply(_kernel: object, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.dequantized.to(x.dtype), bias)
