"""What on this machine decides the last bit of a calibration: the kernels that multiply matrices."""

from __future__ import annotations

import platform
from collections.abc import Mapping


def processor() -> Mapping[str, str]:
    """The machine's kind, and the kernels that BLAS (`blas`) and torch chose for it; "" for what is unknown.

    Matrix products are BLAS's and torch's, whose kernels sum in another order for another kind of processor.
    """
    import torch
    from threadpoolctl import threadpool_info

    pools = [each for each in threadpool_info() if each.get("user_api") == "blas"]
    names = {
        f"{each.get('internal_api')} {each.get('version')} {each.get('architecture', '')}".strip() for each in pools
    }
    return {
        "machine": platform.machine(),
        "blas": ", ".join(sorted(names)),
        "torch": f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}",
    }
