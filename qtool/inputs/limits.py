"""How large a picture and how many frames the model sees.

Rule: the numbers and the rule of the official Qwen3-VL scripts, which resize before the processor and switch its own resize off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from qtool.errors import UsageError

MAX_ASPECT_RATIO: Final = 200


@dataclass(frozen=True)
class PixelLimits:
    """Geometry of the vision input; the defaults are those of the official Qwen3-VL scripts.

    `min_pixels` and `max_pixels` bound an image, `total_pixels` all frames of a list together. A frame of a video has
    bounds of its own, `frame_min_pixels` and `frame_max_pixels`, and the official classes bound a file's frames by no total.
    """

    patch: int = 16
    merge: int = 2
    temporal_patch: int = 2
    min_pixels: int = 4 * 32 * 32
    max_pixels: int = 1800 * 32 * 32
    total_pixels: int = 10 * 768 * 32 * 32
    frame_min_pixels: int = 128 * 32 * 32
    frame_max_pixels: int = 768 * 32 * 32
    fps: float = 1.0
    max_frames: int = 64
    mean: float = 0.5
    std: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise UsageError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels} leave no size for a picture"
            )
        if self.total_pixels < 1:
            raise UsageError(f"total_pixels is {self.total_pixels}; it must be at least 1")

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this."""
        return self.patch * self.merge


OFFICIAL_LIMITS: Final = PixelLimits()


def smart_resize(height: int, width: int, limits: PixelLimits = OFFICIAL_LIMITS) -> tuple[int, int]:
    """The (height, width) to resize to, as `qwen_vl_utils.smart_resize`. Raises UsageError.

    Sides below half a factor differ from the transformers processor (which rounds them to zero first);
    official scripts resize before the processor and switch its resize off, so theirs is the rule.
    """
    return fitted(height, width, limits.factor, limits.min_pixels, limits.max_pixels)


def fitted(height: int, width: int, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """`smart_resize` with bounds of one's own."""
    _check_aspect(height, width)
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = math.floor(height / shrink / factor) * factor
        columns = math.floor(width / shrink / factor) * factor
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    if not rows * columns:
        raise UsageError(f"a picture of {width}x{height} pixels vanishes when it is resized to {max_pixels:.0f} pixels")
    return rows, columns


def _check_aspect(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UsageError(
            f"a picture of {width}x{height} pixels is too narrow for the model",
            f"the longer side may be at most {MAX_ASPECT_RATIO} times the shorter one",
        )
