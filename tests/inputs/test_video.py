"""Videos against what the official functions made of them (`official_videos.py`)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from qtool.errors import NetworkError, SetupError, UsageError
from qtool.inputs import videos as video_file
from qtool.inputs.items import OFFICIAL_LIMITS, Video
from qtool.inputs.media import LocalAddress
from qtool.inputs.videos import frame_size, frames_wanted, patchify_video
from tests.inputs.films import Film, frames
from tests.inputs.official_videos import CASES, EVERY, WRITTEN, Case, samples
from tests.inputs.site import serve

OFFICIAL = json.loads(WRITTEN.read_text())


def asked(case: Case, folder: Path) -> Video:
    film = case.film
    if case.is_list:
        return Video(frames(film.count, film.width, film.height, film.seed), max_frames=case.max_frames)
    return Video(str(film.write(folder / "film.mov")), case.fps, case.max_frames)


@pytest.mark.parametrize("name", CASES)
def test_frames_times_sizes_and_pixels_are_the_official_ones(name: str, tmp_path: Path) -> None:
    seen = patchify_video(asked(CASES[name], tmp_path))
    steps, rows, columns = OFFICIAL[name]["grid"]
    assert [step.grid_thw for step in seen.steps] == [(1, rows, columns)] * steps
    assert [f"{second:.1f}" for second in seen.seconds] == OFFICIAL[name]["times"]
    ours = samples(np.concatenate([step.pixel_values for step in seen.steps]))
    # Equal where it was written; another processor may add in another order and round a byte to its neighbour.
    assert len(ours) == len(OFFICIAL[name]["pixels"]) > 100
    assert np.abs(ours - OFFICIAL[name]["pixels"]).max() <= 1
    assert (ours == OFFICIAL[name]["pixels"]).mean() > 0.99
    assert seen.placeholder_tokens == steps * rows * columns // 4


def test_both_frames_of_a_step_are_seen() -> None:
    shown = frames(2, 512, 256)
    (step,) = patchify_video(Video(shown)).steps
    first, second = (patchify_video(Video((frame,))).steps[0] for frame in shown)
    halves = step.pixel_values.reshape(-1, 3, 2, 256)
    np.testing.assert_array_equal(halves[:, :, 0], first.pixel_values.reshape(-1, 3, 2, 256)[:, :, 0])
    np.testing.assert_array_equal(halves[:, :, 1], second.pixel_values.reshape(-1, 3, 2, 256)[:, :, 1])
    assert EVERY % 2  # the samples above come from both frames


@pytest.mark.parametrize(
    ("total", "rate", "fps", "most", "wanted"),
    [
        (100, 25, 1, 64, 4),
        (250, 25, 1, 64, 10),
        (275, 25, 1, 64, 10),
        (9999, 25, 1, 64, 64),
        (3, 25, 1, 64, 2),
        (80, 8, 1, 7, 6),
    ],
)
def test_the_number_of_frames_is_even_and_bounded(total: int, rate: float, fps: float, most: int, wanted: int) -> None:
    assert frames_wanted(total, rate, replace(OFFICIAL_LIMITS, fps=fps, max_frames=most)) == wanted


@pytest.mark.parametrize(("total", "most"), [(1, 64), (100, 1)])
def test_less_than_a_pair_of_frames_is_no_video(total: int, most: int) -> None:
    with pytest.raises(UsageError, match="expected at least 2"):
        frames_wanted(total, 25, replace(OFFICIAL_LIMITS, max_frames=most))


def test_many_frames_share_the_total_down_to_a_least_size() -> None:
    assert frame_size(720, 1280, 2, OFFICIAL_LIMITS.total_pixels) == (640, 1152)
    assert frame_size(720, 1280, 64, OFFICIAL_LIMITS.total_pixels) == (352, 640)
    assert frame_size(720, 1280, 64, 1) == (256, 480)


def test_frames_of_a_list_may_lie_anywhere_and_must_be_of_a_size(tmp_path: Path) -> None:
    shown = frames(2)
    shown[0].save(tmp_path / "0.png")
    seen = patchify_video(Video((str(tmp_path / "0.png"), shown[1])))
    np.testing.assert_array_equal(seen.steps[0].pixel_values, patchify_video(Video(shown)).steps[0].pixel_values)
    with pytest.raises(UsageError, match="differ in size"):
        patchify_video(Video((shown[0], Image.new("RGB", (200, 80)))))
    with pytest.raises(UsageError, match=r"Cannot read the picture .*1\.png: No such file"):
        patchify_video(Video((shown[0], str(tmp_path / "1.png"))))


def test_a_list_has_no_frame_rate_and_a_video_has_frames() -> None:
    with pytest.raises(UsageError, match="fps applies to a file"):
        Video(frames(2), fps=2.0)
    for wrong in ({"source": ()}, {"source": "a.mp4", "fps": 0.0}, {"source": "a.mp4", "max_frames": 0}):
        with pytest.raises(UsageError):
            Video(**wrong)


def broken_films(folder: Path) -> dict[str, Path]:
    whole = Film(20).write(folder / "whole.mov").read_bytes()
    (folder / "cut.mov").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("this is no film")
    (folder / "empty.mp4").write_bytes(b"")
    for name in ("sound.wav", "sound.mov"):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            stream.layout = "mono"
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))
    frames(1)[0].save(folder / "still.png")
    Film(1).write(folder / "one.mov")
    return {path.name: path for path in (*folder.iterdir(), folder / "missing.mp4")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.mov", "It is broken"),
        ("text.mp4", "It is broken"),
        ("empty.mp4", "It is broken"),
        ("sound.wav", "It is broken"),
        ("sound.mov", "It contains no video"),
        ("still.png", "It is broken"),
        ("one.mov", "Too few frames: it has 1, and max_frames is 64; expected at least 2"),
        ("missing.mp4", "No such file"),
    ],
)
def test_what_is_no_video_is_an_error_that_names_it(name: str, message: str, tmp_path: Path) -> None:
    path = broken_films(tmp_path)[name]
    with pytest.raises(UsageError, match=f"Cannot read the video .*: {message}"):
        patchify_video(Video(str(path)))


def test_a_film_whose_data_is_damaged_in_the_middle_is_broken_or_shorter(tmp_path: Path) -> None:
    path = Film(20).write(tmp_path / "film.mov")
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="It is broken"):
        patchify_video(Video(str(path)))


@pytest.mark.parametrize(
    ("bound", "value", "message"),
    [
        ("MAX_FRAMES", 30, "longer than"),
        ("MAX_SECONDS", 1, "longer than"),
        ("_MAX_BYTES", 2000, "bytes"),
        ("_MAX_FRAME_PIXELS", 1000, "80x48 pixels; the limit is 1,000"),
    ],
)
def test_an_endless_or_huge_film_is_refused(
    bound: str, value: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_file, bound, value)
    with pytest.raises(UsageError, match=message):
        patchify_video(Video(str(Film(60).write(tmp_path / "film.mov"))))


def test_a_playlist_leads_nowhere_else(tmp_path: Path) -> None:
    with serve({"/part.ts": b"never asked for"}) as site:
        playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{url}/part.ts\n#EXT-X-ENDLIST\n"
        (tmp_path / "film.m3u8").write_text(playlist.format(url=site.url))
        with pytest.raises(UsageError, match="Cannot read the video"):
            patchify_video(Video(str(tmp_path / "film.m3u8")))
        assert site.asked == []


def test_a_film_behind_an_address_is_seen_as_the_file_is(tmp_path: Path) -> None:
    path = Film(40, Fraction(10)).write(tmp_path / "film.mov")
    with serve({"/film.mov": path.read_bytes()}) as site:
        there = patchify_video(Video(LocalAddress(f"{site.url}/film.mov")))
        with pytest.raises(NetworkError, match=r"Cannot read the video .*500"):
            patchify_video(Video(LocalAddress(f"{site.url}/500")))
    here = patchify_video(Video(str(path)))
    np.testing.assert_array_equal(there.steps[1].pixel_values, here.steps[1].pixel_values)


def test_files_need_the_extra_and_lists_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SetupError) as caught:
        patchify_video(Video("film.mp4"))
    assert "pip install 'qtool-retrieval[video]'" in caught.value.hint
    assert patchify_video(Video(frames(2))).placeholder_tokens > 0
