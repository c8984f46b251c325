"""Videos for tests, drawn by number and stored without loss, so that every decoder gives the same pixels."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels(seed: int, place: int, width: int, height: int) -> NDArray[np.uint8]:
    """A frame [H, W, 3]: coarse noise that wanders to the right."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    whole = np.kron(np.roll(coarse, place, axis=1), np.ones((8, 8, 1), dtype=np.uint8))
    return np.ascontiguousarray(whole[:height, :width])


def frames(count: int, width: int = 80, height: int = 48, seed: int = 0) -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(pixels(seed, place, width, height)) for place in range(count))


@dataclass(frozen=True)
class Film:
    """A file of `count` frames, `rate` a second."""

    count: int
    rate: Fraction = Fraction(25)
    width: int = 80
    height: int = 48
    seed: int = 0

    def write(self, path: Path) -> Path:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=self.rate)
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, "rgb24"
            for place in range(self.count):
                picture = av.VideoFrame.from_ndarray(pixels(self.seed, place, self.width, self.height), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        return path
