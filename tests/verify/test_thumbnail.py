from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from qtool.errors import QtoolError
from qtool.verify.compare import thumbnail


def opened(url):
    head, _, data = url.partition(";base64,")
    return head, Image.open(BytesIO(base64.b64decode(data)))


def test_a_drawing_becomes_a_small_png_and_keeps_its_shape():
    picture = Image.new("RGB", (640, 320), "red")
    head, small = opened(thumbnail(picture))
    assert (head, small.size, small.getpixel((0, 0))) == ("data:image/png", (160, 80), (255, 0, 0))
    assert picture.size == (640, 320)


def test_a_photograph_becomes_a_jpeg_that_can_be_mailed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    url = thumbnail(str(tmp_path / "noise.png"))
    head, small = opened(url)
    assert (head, small.size) == ("data:image/jpeg", (120, 160))
    assert len(url) < 12_000  # noise is the worst case: 9.9 kB measured


def test_a_small_picture_is_not_blown_up_and_a_broken_one_is_named(tmp_path):
    assert opened(thumbnail(Image.new("RGB", (20, 10))))[1].size == (20, 10)
    (tmp_path / "broken.png").write_text("no picture")
    with pytest.raises(QtoolError, match=r"broken\.png"):
        thumbnail(str(tmp_path / "broken.png"))
