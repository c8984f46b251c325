"""Pictures as the Qwen3-VL vision tower reads them.

Rule: follow the official path (load, RGB, PIL bicubic resize, normalise, patchify) to the
last bit, with pillow and numpy alone; its tests compare it with the transformers processor.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qtool.errors import QtoolError

MAX_ASPECT_RATIO = 200
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class PixelLimits:
    """Geometry of the vision input; the defaults are those of the official Qwen3-VL scripts."""

    patch: int = 16
    merge: int = 2
    temporal_patch: int = 2
    min_pixels: int = 4 * 32 * 32
    max_pixels: int = 1800 * 32 * 32
    mean: float = 0.5
    std: float = 0.5

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this."""
        return self.patch * self.merge


OFFICIAL_LIMITS = PixelLimits()


@dataclass(frozen=True)
class PatchedImage:
    """One picture, ready for the vision tower.

    `pixel_values` is float32 [t·h·w, 3·temporal_patch·patch²], rows ordered by merge windows;
    `grid_thw` counts patches; the language model sees `placeholder_tokens` picture tokens.
    """

    pixel_values: NDArray[np.float32]
    grid_thw: tuple[int, int, int]
    placeholder_tokens: int


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """Read a path, a `data:` URL or a PIL image into RGB; transparency falls on white.

    As in the official loader, an EXIF rotation is not applied. Raises QtoolError.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    try:
        with Image.open(_opened(source)) as image:
            return to_rgb(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise QtoolError(
            f"cannot read the picture {_shown(source)}: {error}",
            "pass a picture file that pillow reads, or a base64 data: URL",
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as `qwen_vl_utils.to_rgb`: only the RGBA mode is composed, on white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def smart_resize(height: int, width: int, limits: PixelLimits = OFFICIAL_LIMITS) -> tuple[int, int]:
    """Return the (height, width) to resize to, as `qwen_vl_utils.smart_resize`. Raises QtoolError.

    Sides below half a factor differ from the transformers processor (which rounds them to zero first);
    official scripts resize before the processor and switch its resize off, so theirs is the rule.
    """
    _check_aspect(height, width)
    factor = limits.factor
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > limits.max_pixels:
        shrink = math.sqrt(height * width / limits.max_pixels)
        rows = math.floor(height / shrink / factor) * factor
        columns = math.floor(width / shrink / factor) * factor
    elif rows * columns < limits.min_pixels:
        grow = math.sqrt(limits.min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def resize_image(image: Image.Image, limits: PixelLimits = OFFICIAL_LIMITS) -> Image.Image:
    """Resize an RGB picture to the official grid, bicubic."""
    rows, columns = smart_resize(image.height, image.width, limits)
    return image.resize((columns, rows), Image.Resampling.BICUBIC)


def patchify(image: Image.Image, limits: PixelLimits = OFFICIAL_LIMITS) -> PatchedImage:
    """Resize, normalise and cut one picture; its frame is repeated to fill the temporal patch."""
    resized = resize_image(to_rgb(image), limits)
    rows, columns = resized.height // limits.patch, resized.width // limits.patch
    pixels = _normalise(np.asarray(resized), limits)
    return PatchedImage(
        pixel_values=_cut(pixels, rows, columns, limits),
        grid_thw=(1, rows, columns),
        placeholder_tokens=rows * columns // limits.merge**2,
    )


def _cut(pixels: NDArray[np.float32], rows: int, columns: int, limits: PixelLimits) -> NDArray[np.float32]:
    """[3, H, W] to [rows·columns, 3·t·p²]: merge windows first, then the patches inside a window."""
    patch, merge = limits.patch, limits.merge
    windows = pixels.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
    ordered = windows.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, patch * patch)
    frames = np.repeat(ordered, limits.temporal_patch, axis=2)
    return np.ascontiguousarray(frames.reshape(rows * columns, -1))


def _normalise(pixels: NDArray[np.uint8], limits: PixelLimits) -> NDArray[np.float32]:
    """[H, W, 3] bytes to [3, H, W]; rescaled in float64 and rounded once, as the processor does."""
    rescaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    normalised = (rescaled - np.float32(limits.mean)) / np.float32(limits.std)
    return normalised.transpose(2, 0, 1).astype(np.float32, copy=False)


def _check_aspect(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise QtoolError(
            f"a picture of {width}x{height} pixels is too narrow for the model",
            f"the longer side may be at most {MAX_ASPECT_RATIO} times the shorter one",
        )


def _opened(source: str | Path) -> str | Path | BytesIO:
    if not (isinstance(source, str) and source.startswith("data:")):
        return source
    header, _, payload = source.partition(",")
    if not header.endswith(";base64"):
        raise OSError("only base64 data: URLs are read")
    try:
        return BytesIO(base64.b64decode(payload, validate=True))
    except binascii.Error as error:
        raise OSError(f"broken base64 ({error})") from error


def _shown(source: str | Path) -> str:
    text = str(source)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
