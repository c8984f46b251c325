"""The scales that llama.cpp loads and does not multiply by, which no error tells.

Rule: found by running it, and declared here once for all who warn of it or refuse; a test that is expected to fail will
tell when llama.cpp has changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from qtool.formats.ggml import NVFP4
from qtool.gguf_file.reader import GgufTensor

_IGNORED: Final[Mapping[str, re.Pattern[str]]] = {"qwen3vl": re.compile(r"blk\.\d+\.ffn_(up|gate|down)\.scale")}
"""By architecture; the graph of qwen3, unlike qwen3vl's, applies them."""
SEEN_IN: Final = "b11549"


def ignored_scales(architecture: str | None, tensors: Mapping[str, GgufTensor]) -> list[str]:
    """The global scales of NVFP4 tensors without which llama.cpp computes."""
    pattern = _IGNORED.get(architecture or "")
    packed = [name.removesuffix(".weight") + ".scale" for name, each in tensors.items() if each.type is NVFP4]
    return [name for name in packed if pattern and name in tensors and pattern.fullmatch(name)]
