"""Pictures as the Qwen3-VL vision tower reads them.

The official path (load, RGB, PIL bicubic resize, normalise, patchify), bit for bit, with pillow and numpy alone; tests
compare it with the transformers processor.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from qtool.errors import QtoolError, UsageError, reason
from qtool.inputs.items import OFFICIAL_LIMITS, PixelLimits, smart_resize
from qtool.inputs.media import open_media, quoted

_MAX_BYTES: Final = 128 << 20
_SECONDS: Final = 60.0
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What pillow may take a file for. Of its other forty formats one runs Ghostscript, and most are decoders that few look
after and nobody needs here."""
_HINT: Final = "Pass a PNG, JPEG, WebP, GIF, BMP or TIFF file, an http(s) address, or a base64 data: URL."


@dataclass(frozen=True)
class PatchedImage:
    """One picture, or two consecutive frames of a video, ready for the vision tower.

    `pixel_values` is float32 [t·h·w, 3·temporal_patch·patch²], rows ordered by merge windows;
    `grid_thw` counts patches; the language model sees `placeholder_tokens` picture tokens.
    """

    pixel_values: NDArray[np.float32]
    grid_thw: tuple[int, int, int]
    placeholder_tokens: int


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """The RGB picture of a path, an address, a `data:` URL or a PIL image; RGBA is composed on white.

    As in the official loader, an EXIF rotation is not applied, and of an animation the first frame is taken. Raises
    UsageError for a missing, broken or too large picture, NetworkError for a failed transfer.
    """
    if isinstance(source, Image.Image):
        decode(source)
        return to_rgb(source)
    try:
        return _decoded(source)
    except QtoolError as error:
        raise type(error)(f"Cannot read the picture {quoted(source)}: {error.message}", error.hint or _HINT) from error


def decode(image: Image.Image) -> None:
    """Decode a picture in memory, which `Image.open` postpones. Raises UsageError where it is broken."""
    try:
        image.load()
    except Exception as error:  # as in _decoded
        name = quoted(getattr(image, "filename", "") or "in memory")
        raise UsageError(f"Cannot read the picture {name}: {reason(error)}.", _HINT) from error


def _decoded(source: str | Path) -> Image.Image:
    content = open_media(source, _MAX_BYTES, _SECONDS)
    try:
        # Up to its limit of about 179 million pixels pillow only warns, and the official loader continues.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(content, formats=FORMATS) as image:
                return to_rgb(image)
    except UnidentifiedImageError as error:  # whose own text names an object of Python
        raise UsageError("Unknown format: expected PNG, JPEG, WebP, GIF, BMP or TIFF.") from error
    except Exception as error:  # pillow's decoders raise exceptions of any kind
        raise UsageError(f"{reason(error)}.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, as `qwen_vl_utils.to_rgb` converts it: only RGBA is composed on white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def resize_image(image: Image.Image, limits: PixelLimits = OFFICIAL_LIMITS) -> Image.Image:
    """An RGB picture, resized to the official grid with bicubic interpolation."""
    rows, columns = smart_resize(image.height, image.width, limits)
    return image.resize((columns, rows), Image.Resampling.BICUBIC)


def patchify(image: Image.Image, limits: PixelLimits = OFFICIAL_LIMITS) -> PatchedImage:
    """Resize, normalise and cut one picture; its frame is repeated to fill the temporal patch."""
    pixels = _normalise(np.asarray(resize_image(to_rgb(image), limits)), limits)
    return patches_of(np.stack([pixels] * limits.temporal_patch), limits)


def patches_of(frames: NDArray[np.float32], limits: PixelLimits = OFFICIAL_LIMITS) -> PatchedImage:
    """The patches of normalised frames [temporal_patch, 3, H, W], ordered by merge windows: one step in time."""
    patch, merge = limits.patch, limits.merge
    rows, columns = frames.shape[2] // patch, frames.shape[3] // patch
    windows = frames.reshape(len(frames), 3, rows // merge, merge, patch, columns // merge, merge, patch)
    ordered = windows.transpose(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1)
    return PatchedImage(np.ascontiguousarray(ordered), (1, rows, columns), rows * columns // merge**2)


def _normalise(pixels: NDArray[np.uint8], limits: PixelLimits) -> NDArray[np.float32]:
    """[H, W, 3] bytes to [3, H, W]; rescaled in float64 and rounded once, as the processor does."""
    rescaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    normalised = (rescaled - np.float32(limits.mean)) / np.float32(limits.std)
    return normalised.transpose(2, 0, 1).astype(np.float32, copy=False)
