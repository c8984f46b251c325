"""What the official code makes of videos, written down once, and the program that wrote it.

The official path needs torchvision, decord and qwen-vl-utils, which the tests do without. With them installed,

    python -m tests.inputs.official_videos

writes `official_videos.json` again. It was last written with qwen-vl-utils 0.0.14, decord 0.6.0, torchvision 0.28.0,
torch 2.13.0 and transformers 5.14.1.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tests.inputs.films import Film, frames

WRITTEN = Path(__file__).with_suffix(".json")
EVERY = 5003
"""Of the pixels of a video, one in so many is written down."""


@dataclass(frozen=True)
class Case:
    """A film, or that many frames as a list, and what the user asks for."""

    film: Film
    is_list: bool = False
    fps: float = 1.0
    max_frames: int = 64


CASES = {
    "second and a half": Case(Film(40)),
    "ntsc": Case(Film(90, Fraction(30000, 1001), 120, 75)),
    "one pair": Case(Film(2)),
    "tall": Case(Film(37, Fraction(12), 40, 200)),
    "few frames of many": Case(Film(300, Fraction(10), 64, 48), fps=2.0, max_frames=7),
    "fast": Case(Film(30, Fraction(15), 100, 100), fps=9.0),
    "more frames than there are": Case(Film(9, Fraction(3)), fps=30.0),
    "large": Case(Film(4, Fraction(2), 1280, 720)),
    "list of one": Case(Film(1), is_list=True),
    "list of three": Case(Film(3, width=90, height=60), is_list=True),
    "list of large ones": Case(Film(2, width=1000, height=900), is_list=True),
    "list of more than are kept": Case(Film(12), is_list=True, max_frames=5),
}


def official(case: Case, folder: Path) -> dict[str, Any]:
    """Grid, times and some pixels, by the official functions."""
    from qwen_vl_utils.vision_process import fetch_video
    from transformers import Qwen3VLVideoProcessor

    (video, metadata), _ = fetch_video(
        _asked(case, folder), 16, return_video_sample_fps=True, return_video_metadata=True
    )
    processor = Qwen3VLVideoProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    seen = processor([video], video_metadata=[metadata], do_resize=False, do_sample_frames=False, return_tensors="np")
    places = [int(place) for place in metadata["frames_indices"]]
    times = [(one + other) / 2 / metadata["fps"] for one, other in zip(places[::2], places[1::2], strict=True)]
    return {
        "grid": seen["video_grid_thw"][0].tolist(),
        "times": [f"{time:.1f}" for time in times],
        "pixels": samples(seen["pixel_values_videos"]).tolist(),
    }


def samples(values: Any) -> Any:
    """One in EVERY of the values, as the bytes that they came from."""
    return np.round(np.asarray(values).reshape(-1)[::EVERY] * 127.5 + 127.5).astype(np.int16)


def _asked(case: Case, folder: Path) -> dict[str, Any]:
    """What `format_mm_content` of the official classes asks of `fetch_video`."""
    if not case.is_list:
        path = case.film.write(folder / "film.mov")
        return {"type": "video", "video": f"file://{path}", "fps": case.fps, "max_frames": case.max_frames}
    shown = frames(case.film.count, case.film.width, case.film.height, case.film.seed)
    if len(shown) > case.max_frames:
        shown = tuple(shown[place] for place in np.linspace(0, len(shown) - 1, case.max_frames, dtype=int).tolist())
    return {"type": "video", "video": list(shown), "total_pixels": 10 * 768 * 32 * 32}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {name: official(case, Path(folder)) for name, case in CASES.items()}
    WRITTEN.write_text(json.dumps(found) + "\n")
