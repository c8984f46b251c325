"""Frames out of a video file, by PyAV (the `video` extra).

Rule: bounded. A file is read up to a number of bytes, frames and seconds, and one frame at a time is in memory besides
those that were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qtool.errors import SetupError, UsageError
from qtool.inputs.sources import opened

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_SECONDS: Final = 2 * 3600
MAX_FRAMES: Final = MAX_SECONDS * 60
_MAX_BYTES: Final = 1 << 30
_MAX_FRAME_PIXELS: Final = 1 << 26
_FETCH_SECONDS: Final = 600.0


@dataclass(frozen=True)
class FileFrames:
    """The frames [H, W, 3] at `places` of a file that shows `rate` frames a second."""

    frames: list[NDArray[np.uint8]]
    places: Sequence[int]
    rate: float


def read_frames(source: str, choose: Callable[[int, float], Sequence[int]]) -> FileFrames:
    """The frames that `choose` names, given how many there are and how many a second; as stored, not rotated.

    Raises UsageError for a file that is broken, empty or too long, NetworkError where an address does not answer,
    SetupError without the package av.
    """
    _check_installed()
    found = opened(source, _MAX_BYTES, _FETCH_SECONDS)
    # What a header says of the number of frames is often wrong, so they are counted first.
    with _stream(found) as stream:
        rate = float(stream.average_rate or 0)
        total = sum(1 for _ in _frames(stream))
    if not total or not rate:
        raise UsageError("it does not say how many frames it shows a second" if total else "it has no frame")
    places = choose(total, rate)
    with _stream(found) as stream:
        kept = {place: frame.to_ndarray(format="rgb24") for place, frame in _frames(stream) if place in set(places)}
    return FileFrames([kept[place] for place in places], places, rate)


def _check_installed() -> None:
    if find_spec("av") is None:
        raise SetupError("Reading video files takes the package av.", "pip install 'qtool[video]'")


@contextmanager
def _stream(found: Path | BytesIO) -> Iterator[Any]:
    """The first video stream of the file; what goes wrong with it is the file's fault."""
    import av

    if isinstance(found, BytesIO):
        found.seek(0)
    try:
        # A playlist may not lead to other hosts.
        with av.open(found, options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise UsageError("it holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield stream
    except (av.FFmpegError, ValueError) as error:
        raise UsageError(f"it is broken ({error})") from error


def _frames(stream: Any) -> Iterator[tuple[int, Any]]:
    """The frames with their places, in the order in which they are shown."""
    for place, frame in enumerate(stream.container.decode(stream)):
        if frame.width * frame.height > _MAX_FRAME_PIXELS:
            raise UsageError(f"its frames of {frame.width}x{frame.height} pixels are too large")
        if place >= MAX_FRAMES or (frame.time or 0) > MAX_SECONDS:
            raise UsageError(f"it is longer than {MAX_SECONDS} seconds or {MAX_FRAMES:,} frames")
        yield place, frame
