"""What on this machine decides the last bit of a calibration: the processor, and the kernels that multiply matrices."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Final

_STEERING: Final = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "ATEN_CPU_CAPABILITY",
)
"""Variables by which a library is told to take other kernels than the processor's."""


def processor() -> Mapping[str, str]:
    """The machine and its processor's family, the kernels that BLAS and torch chose for it, and what told them to.

    Matrix products are those of OpenBLAS, and of MKL and oneDNN in torch, whose kernels for another kind of processor sum
    in another order. MKL and oneDNN do not say which they took; the family of the processor decides it.
    """
    import torch
    from llvmlite import binding
    from threadpoolctl import threadpool_info

    pools = [each for each in threadpool_info() if each.get("user_api") == "blas"]
    names = {
        f"{each.get('internal_api')} {each.get('version')} {each.get('architecture', '')}".strip() for each in pools
    }
    told = [f"{name}={os.environ[name]}" for name in _STEERING if os.environ.get(name)]
    return {
        "machine": f"{platform.machine()} {binding.get_host_cpu_name()}",
        "blas": ", ".join(sorted(names)),
        "torch": f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}",
        "variables": ", ".join(told),
    }
