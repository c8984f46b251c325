"""Videos as the Qwen3-VL vision tower reads them: frames in pairs, each pair a small picture with its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from qtool.errors import QtoolError, UsageError
from qtool.extras import require_extra
from qtool.inputs.items import OFFICIAL_LIMITS, ImageSource, PixelLimits, Video, fitted
from qtool.inputs.media import opened, shown
from qtool.inputs.pictures import PatchedImage, cut, load_image, resize_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Frames out of a video file, by PyAV (the `video` extra). Bounded. A file is read up to a number of bytes, frames and
# seconds, and one frame at a time is in memory besides those that were asked for.


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
    require_extra("video", "Reading video files")
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


# Videos as the Qwen3-VL vision tower reads them: frames in pairs, each pair a small picture with its time. Frames,
# sizes and times are those that the official scripts and `qwen_vl_utils` choose, to the last bit.


_LIST_FPS: Final = 2.0
"""What qwen_vl_utils takes a list of frames for."""
_LIST_FACTOR: Final = 64
"""Sides of a list's frames become multiples of it before the video is looked at as a whole: qwen_vl_utils 0.0.14, the
latest release, passes on 32 where a patch's 16 is meant (its repository has mended that since)."""
_FILE_TOTAL_PIXELS: Final = 128_000 * 32 * 32 * 0.9
"""What all frames of a file may have: the official classes pass their own total for lists only."""
_FEWEST: Final = 4
"""Frames of a file, where it has so many."""


@dataclass(frozen=True)
class PatchedVideo:
    """A video, ready for the model: its steps in time, and at which second of it each lies."""

    steps: tuple[PatchedImage, ...]
    seconds: tuple[float, ...]

    @property
    def placeholder_tokens(self) -> int:
        """Video tokens in the prompt."""
        return sum(step.placeholder_tokens for step in self.steps)


def patchify_video(video: Video, limits: PixelLimits = OFFICIAL_LIMITS) -> PatchedVideo:
    """Read, sample, resize and cut a video. Raises UsageError, NetworkError, or SetupError without the package av."""
    limits = replace(limits, fps=video.fps or limits.fps, max_frames=video.max_frames or limits.max_frames)
    if isinstance(video.source, str):
        return _patched(*_of_file(video.source, limits), _FILE_TOTAL_PIXELS, limits)
    return _patched(*_of_list(video.source, limits), limits.total_pixels, limits)


def frames_wanted(total: int, rate: float, limits: PixelLimits) -> int:
    """How many of a file's `total` frames, of which there are `rate` a second, are read: an even number."""
    most = limits.max_frames // 2 * 2
    wanted = int(min(max(total / rate * limits.fps, _FEWEST), most, total) // 2 * 2)
    if wanted < 2:
        raise UsageError(f"it has {total} frames, of which at most {limits.max_frames} are read: not a pair")
    return wanted


def frame_size(
    height: int, width: int, frames: int, total_pixels: float, limits: PixelLimits = OFFICIAL_LIMITS
) -> tuple[int, int]:
    """The (height, width) to which each of so many frames is resized."""
    share = total_pixels / frames * 2  # two frames make one step
    most = max(min(limits.frame_max_pixels, share), int(limits.frame_min_pixels * 1.05))
    return fitted(height, width, limits.factor, limits.frame_min_pixels, most)


def _of_file(source: str, limits: PixelLimits) -> tuple[list[NDArray[np.uint8]], list[float]]:
    def chosen(total: int, rate: float) -> list[int]:
        import torch

        # Its own float32 rounding decides which of two frames is nearer.
        places: list[int] = torch.linspace(0, total - 1, frames_wanted(total, rate, limits)).round().long().tolist()
        return places

    try:
        read = read_frames(source, chosen)
    except QtoolError as error:
        raise type(error)(f"cannot read the video {shown(source)}: {error.message}", error.hint) from error
    return read.frames, [place / read.rate for place in read.places]


def _of_list(frames: Sequence[ImageSource], limits: PixelLimits) -> tuple[list[NDArray[np.uint8]], list[float]]:
    if len(frames) > limits.max_frames:
        frames = [frames[place] for place in np.linspace(0, len(frames) - 1, limits.max_frames, dtype=int)]
    first = PixelLimits(_LIST_FACTOR // 2, min_pixels=4 * _LIST_FACTOR**2, max_pixels=16384 * _LIST_FACTOR**2)
    loaded = [np.asarray(resize_image(load_image(frame), first)) for frame in frames]
    shapes = sorted({frame.shape[:2] for frame in loaded})
    if len(shapes) > 1:
        raise UsageError(f"the frames of a video differ in size: {shapes[0]} and {shapes[-1]} (height, width)")
    loaded += loaded[-1:] * (len(loaded) % 2)
    return loaded, [place / _LIST_FPS for place in range(len(loaded))]


def _patched(
    frames: list[NDArray[np.uint8]], times: list[float], total_pixels: float, limits: PixelLimits
) -> PatchedVideo:
    height, width = frames[0].shape[:2]
    size = frame_size(height, width, len(frames), total_pixels, limits)
    pairs: Iterator[list[NDArray[np.uint8]]] = (frames[start : start + 2] for start in range(0, len(frames), 2))
    steps = tuple(cut(np.stack([_normalised(_resized(frame, size), limits) for frame in pair])) for pair in pairs)
    return PatchedVideo(steps, tuple((one + other) / 2 for one, other in zip(times[::2], times[1::2], strict=True)))


def _resized(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """[H, W, 3] as torchvision resizes a tensor: bicubic in float32, unlike PIL's fixed-point arithmetic."""
    import torch

    if frame.shape[:2] == size:
        return frame
    pixels = torch.from_numpy(frame.transpose(2, 0, 1)[None].astype(np.float32))
    resized = torch.nn.functional.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    found: NDArray[np.uint8] = resized.clamp(0, 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    return found


def _normalised(frame: NDArray[np.uint8], limits: PixelLimits) -> NDArray[np.float32]:
    """[H, W, 3] bytes to [3, H, W]; the processor folds the rescaling of a video into mean and deviation."""
    mean, std = np.float32(limits.mean * 255), np.float32(limits.std * 255)
    return (frame.transpose(2, 0, 1).astype(np.float32) - mean) / std
