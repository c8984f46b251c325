"""Pictures against the transformers processor, whose arithmetic is the official one."""

from __future__ import annotations

import base64
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qtool.errors import QtoolError, UsageError
from qtool.inputs.items import OFFICIAL_LIMITS, PixelLimits, smart_resize
from qtool.inputs.pictures import load_image, patchify, resize_image, to_rgb

SIZES = [(96, 96), (1, 1), (1, 200), (200, 1), (31, 33), (64, 65), (17, 900), (640, 480), (1500, 1400), (48, 48)]


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(size[0] * 1000 + size[1])
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = random.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode=None).convert(mode)


def processor(limits: PixelLimits, *, resize: bool) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=limits.patch,
        merge_size=limits.merge,
        temporal_patch_size=limits.temporal_patch,
        image_mean=[limits.mean] * 3,
        image_std=[limits.std] * 3,
        size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels},
        do_resize=resize,
    )


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_the_processor_after_the_official_resize(size: tuple[int, int]) -> None:
    image = noise(size)
    ours = patchify(image)
    theirs = processor(OFFICIAL_LIMITS, resize=False)(resize_image(image), return_tensors="np")
    np.testing.assert_array_equal(ours.pixel_values, theirs["pixel_values"])
    assert ours.pixel_values.dtype == np.float32
    assert [list(ours.grid_thw)] == theirs["image_grid_thw"].tolist()
    assert ours.placeholder_tokens * 4 == len(ours.pixel_values) == np.prod(ours.grid_thw)
    assert ours.pixel_values.shape[1] == 3 * 2 * 16 * 16


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 16])
def test_the_processors_own_resize_agrees_where_no_side_rounds_to_zero(size: tuple[int, int]) -> None:
    image = noise(size)
    theirs = processor(OFFICIAL_LIMITS, resize=True)(image, return_tensors="np")
    np.testing.assert_array_equal(patchify(image).pixel_values, theirs["pixel_values"])


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (96, 96, (96, 96)),
        (1, 1, (64, 64)),
        (10, 1000, (32, 992)),  # qwen_vl_utils keeps a factor a side; the processor's own rule gives 32x640
        (48, 48, (64, 64)),  # 1.5 rounds to even, as Python's round does
        (4000, 4000, (1344, 1344)),
        (31, 33, (64, 96)),  # 32x32 is below the minimum: both sides grow, rounding up
    ],
)
def test_smart_resize_is_the_official_rule(height: int, width: int, expected: tuple[int, int]) -> None:
    assert smart_resize(height, width) == expected


def test_other_limits_are_followed() -> None:
    limits = PixelLimits(patch=8, min_pixels=16 * 16, max_pixels=64 * 64)
    image = noise((300, 120))
    theirs = processor(limits, resize=True)(image, return_tensors="np")
    np.testing.assert_array_equal(patchify(image, limits).pixel_values, theirs["pixel_values"])


def test_a_picture_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(QtoolError, match="too narrow"):
        smart_resize(1, 201)


def test_transparency_falls_on_white() -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert to_rgb(image).getpixel((3, 3)) == (255, 255, 255)
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert to_rgb(half).getpixel((3, 3)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "CMYK", "LA", "1", "P", "RGB"])
def test_other_modes_convert_as_pil_does(mode: str) -> None:
    image = noise((64, 64), "L").convert(mode) if mode in {"LA", "1"} else noise((64, 64), "RGB").convert(mode)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_an_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    noise((96, 64)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (96, 64)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_path_a_data_url_and_an_image_load_alike(tmp_path: Path) -> None:
    image = noise((40, 50)).quantize(16)
    (tmp_path / "a.png").write_bytes(png(image))
    url = "data:image/png;base64," + base64.b64encode(png(image)).decode()
    loaded = [load_image(source) for source in (tmp_path / "a.png", str(tmp_path / "a.png"), url, image)]
    assert all(np.array_equal(np.asarray(one), np.asarray(image.convert("RGB"))) for one in loaded)


@pytest.mark.parametrize(
    "source",
    [
        "missing.png",
        "data:image/png;base64,%%%",
        "data:image/png;base64," + base64.b64encode(b"not a picture").decode(),
        "data:image/png,plain",
        "data:image/png;base64," + base64.b64encode(png(Image.new("RGB", (64, 64)))[:60]).decode(),
    ],
)
def test_what_is_no_picture_is_an_error_with_a_hint(source: str) -> None:
    with pytest.raises(QtoolError, match="Cannot read the picture") as caught:
        load_image(source)
    assert caught.value.hint
    assert len(caught.value.message) < 300


def test_vision_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, qtool.inputs.pictures; sys.exit(bool({'torch', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_picture_in_memory_that_was_never_read_whole_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(png(noise((64, 64)))[:2000])
    with (
        Image.open(tmp_path / "cut.png") as lazy,
        pytest.raises(UsageError, match=r"Cannot read the picture .*cut\.png: .*truncated"),
    ):
        load_image(lazy)
    with Image.open(BytesIO(png(noise((64, 64)))[:2000])) as lazy, pytest.raises(UsageError, match="in memory"):
        load_image(lazy)
