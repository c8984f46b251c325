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
from qtool.inputs.media import open_media, quoted
from qtool.inputs.pictures import PatchedImage, load_image, patches_of, resize_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Frames of a video file, decoded by PyAV (the `video` extra) within limits on bytes, frames and seconds. Besides the
# frames that are kept, one at a time is in memory.

MAX_SECONDS: Final = 2 * 3600
MAX_FRAMES: Final = MAX_SECONDS * 60
_MAX_BYTES: Final = 1 << 30
_MAX_FRAME_PIXELS: Final = 1 << 26
_MAX_KEPT: Final = 2 << 30
"""Bytes of all frames that are kept: 64 of 3840x2160 pixels have 1.6 GB."""
_FETCH_SECONDS: Final = 600.0
_FORMATS: Final = "avi,flv,gif,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,ogg,asf"
"""Containers that FFmpeg may take a file for: not the playlists and scripts among them, which name other files."""


@dataclass(frozen=True)
class FileFrames:
    """The frames [H, W, 3] with the given `indices` of a file with `rate` frames per second."""

    frames: list[NDArray[np.uint8]]
    indices: Sequence[int]
    rate: float


def read_frames(source: str, choose: Callable[[int, float], Sequence[int]]) -> FileFrames:
    """The frames whose indices `choose(total, rate)` returns; as stored, not rotated.

    Raises UsageError for a file that is broken, empty or too long, NetworkError for a failed transfer, SetupError
    without the package av.
    """
    require_extra("video", "Reading video files")
    content = open_media(source, _MAX_BYTES, _FETCH_SECONDS)
    # The number of frames in a header is often wrong, so they are counted first.
    with _stream(content) as stream:
        rate = float(stream.average_rate or 0)
        total = sum(1 for _ in _frames(stream))
    if not total:
        raise UsageError("It has no frames.")
    if not rate:
        raise UsageError("It declares no frame rate.")
    indices = choose(total, rate)
    wanted, nbytes = set(indices), 0
    kept = {}
    with _stream(content) as stream:
        for index, frame in _frames(stream):
            if index in wanted:
                nbytes += frame.width * frame.height * 3
                if nbytes > _MAX_KEPT:
                    raise UsageError(
                        f"Its {len(wanted):,} frames have more than {_MAX_KEPT:,} bytes.", "Pass a smaller max_frames."
                    )
                kept[index] = frame.to_ndarray(format="rgb24")
    return FileFrames([kept[index] for index in indices], indices, rate)


@contextmanager
def _stream(content: Path | BytesIO) -> Iterator[Any]:
    """The first video stream of the file. Raises UsageError for whatever PyAV raises."""
    import av

    if isinstance(content, BytesIO):
        content.seek(0)
    try:
        # Nothing in the file may lead to other files or hosts.
        options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        with av.open(content, options=options) as container:
            if not container.streams.video:
                raise UsageError("It contains no video stream.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield stream
    except (av.FFmpegError, ValueError) as error:
        raise UsageError(f"It is broken: {error}.") from error


def _frames(stream: Any) -> Iterator[tuple[int, Any]]:
    """The frames with their indices, in display order."""
    for index, frame in enumerate(stream.container.decode(stream)):
        if frame.width * frame.height > _MAX_FRAME_PIXELS:
            raise UsageError(
                f"Its frames have {frame.width}x{frame.height} pixels; the limit is {_MAX_FRAME_PIXELS:,} pixels."
            )
        if index >= MAX_FRAMES or (frame.time or 0) > MAX_SECONDS:
            raise UsageError(f"It is longer than the limit of {MAX_SECONDS} seconds or {MAX_FRAMES:,} frames.")
        yield index, frame


# Sampling and patches. Frames, sizes and times are those of the official scripts and `qwen_vl_utils`, bit for bit.

_LIST_FPS: Final = 2.0
"""The frame rate that qwen_vl_utils assumes for a list of frames."""
_LIST_FACTOR: Final = 64
"""The frames of a list are first resized to multiples of it: qwen_vl_utils 0.0.14, the latest release, passes 32 where
the patch size 16 is meant (fixed in its repository since)."""
_FILE_TOTAL_PIXELS: Final = 128_000 * 32 * 32 * 0.9
"""The bound for all frames of a file: the official classes pass their own total for lists only."""
_MIN_FRAMES: Final = 4
"""Frames read of a file, where it has that many."""


@dataclass(frozen=True)
class PatchedVideo:
    """A video, ready for the model: its steps in time, and the second of each."""

    steps: tuple[PatchedImage, ...]
    seconds: tuple[float, ...]

    @property
    def placeholder_tokens(self) -> int:
        """Video tokens in the prompt."""
        return sum(step.placeholder_tokens for step in self.steps)


def patchify_video(video: Video, limits: PixelLimits = OFFICIAL_LIMITS) -> PatchedVideo:
    """Read, sample, resize and patchify a video. Raises UsageError, NetworkError, or SetupError without PyAV."""
    limits = replace(limits, fps=video.fps or limits.fps, max_frames=video.max_frames or limits.max_frames)
    if isinstance(video.source, str):
        return _patched(*_of_file(video.source, limits), _FILE_TOTAL_PIXELS, limits)
    return _patched(*_of_list(video.source, limits), limits.total_pixels, limits)


def frames_wanted(total: int, rate: float, limits: PixelLimits) -> int:
    """How many of a file's `total` frames at `rate` per second are read: an even number."""
    most = limits.max_frames // 2 * 2
    wanted = int(min(max(total / rate * limits.fps, _MIN_FRAMES), most, total) // 2 * 2)
    if wanted < 2:
        raise UsageError(f"Too few frames: it has {total}, and max_frames is {limits.max_frames}; expected at least 2.")
    return wanted


def frame_size(
    height: int, width: int, frames: int, total_pixels: float, limits: PixelLimits = OFFICIAL_LIMITS
) -> tuple[int, int]:
    """The (height, width) to which each of `frames` frames is resized."""
    share = total_pixels / frames * 2  # two frames make one step
    most = max(min(limits.frame_max_pixels, share), int(limits.frame_min_pixels * 1.05))
    return fitted(height, width, limits.factor, limits.frame_min_pixels, most)


def _of_file(source: str, limits: PixelLimits) -> tuple[list[NDArray[np.uint8]], list[float]]:
    def choose(total: int, rate: float) -> list[int]:
        import torch

        # torch's float32 rounding decides which of two frames is nearer.
        indices: list[int] = torch.linspace(0, total - 1, frames_wanted(total, rate, limits)).round().long().tolist()
        return indices

    try:
        read = read_frames(source, choose)
    except QtoolError as error:
        raise type(error)(f"Cannot read the video {quoted(source)}: {error.message}", error.hint) from error
    return read.frames, [index / read.rate for index in read.indices]


def _of_list(frames: Sequence[ImageSource], limits: PixelLimits) -> tuple[list[NDArray[np.uint8]], list[float]]:
    if len(frames) > limits.max_frames:
        frames = [frames[index] for index in np.linspace(0, len(frames) - 1, limits.max_frames, dtype=int)]
    first = PixelLimits(_LIST_FACTOR // 2, min_pixels=4 * _LIST_FACTOR**2, max_pixels=16384 * _LIST_FACTOR**2)
    loaded = [np.asarray(resize_image(load_image(frame), first)) for frame in frames]
    shapes = sorted({frame.shape[:2] for frame in loaded})
    if len(shapes) > 1:
        raise UsageError(f"The frames of a video differ in size: {shapes[0]} and {shapes[-1]} (height, width).")
    loaded += loaded[-1:] * (len(loaded) % 2)
    return loaded, [index / _LIST_FPS for index in range(len(loaded))]


def _patched(
    frames: list[NDArray[np.uint8]], times: list[float], total_pixels: float, limits: PixelLimits
) -> PatchedVideo:
    height, width = frames[0].shape[:2]
    size = frame_size(height, width, len(frames), total_pixels, limits)
    pairs: Iterator[list[NDArray[np.uint8]]] = (frames[start : start + 2] for start in range(0, len(frames), 2))
    steps = tuple(
        patches_of(np.stack([_normalised(_resized(frame, size), limits) for frame in pair])) for pair in pairs
    )
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
    """[H, W, 3] bytes to [3, H, W]; the processor folds the rescaling of a video into mean and standard deviation."""
    mean, std = np.float32(limits.mean * 255), np.float32(limits.std * 255)
    return (frame.transpose(2, 0, 1).astype(np.float32) - mean) / std
