"""Pictures behind addresses, and hard ones."""

from __future__ import annotations

import base64
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtool.errors import NetworkError, QtoolError, SetupError, UsageError
from qtool.inputs import media as sources
from qtool.inputs import pictures as vision
from qtool.inputs.items import OFFICIAL_LIMITS, PixelLimits, fitted
from qtool.inputs.media import LocalAddress
from qtool.inputs.pictures import load_image, patchify
from tests.inputs.site import serve


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.retries.FIRST_PAUSE", 0.0)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    target = BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


RED = Image.new("RGB", (40, 30), "red")


@pytest.mark.parametrize("failures", [0, 2])
def test_a_picture_behind_an_address_is_fetched_with_patience_for_passing_failures(failures: int) -> None:
    with serve({"/red.png": encoded(RED)}, failures) as site:
        assert load_image(LocalAddress(f"{site.url}/red.png")).tobytes() == RED.tobytes()
        assert len(site.asked) == failures + 1


def test_one_is_sent_on_to_another_address() -> None:
    with serve({"/red.png": encoded(RED)}) as site:
        assert load_image(LocalAddress(f"{site.url}/away/red.png")).size == RED.size


@pytest.mark.parametrize(
    ("path", "failures", "kind", "message", "requests"),
    [
        ("/gone.png", 0, UsageError, "The server answered 404", 1),
        ("/403", 0, NetworkError, "The server answered 403", 1),
        ("/500", 0, NetworkError, "The server answered 500", 3),
        ("/red.png", 9, NetworkError, "The server answered 503", 3),
        ("/page.html", 0, UsageError, "Unknown format", 1),
    ],
)
def test_what_a_server_answers_is_said(
    path: str, failures: int, kind: type[QtoolError], message: str, requests: int
) -> None:
    with serve({"/red.png": encoded(RED), "/page.html": b"<html>"}, failures) as site:
        with pytest.raises(kind, match=f"Cannot read the picture {site.url}{path}: {message}") as caught:
            load_image(LocalAddress(f"{site.url}{path}"))
        assert type(caught.value) is kind
        assert len(site.asked) == requests


def test_a_server_that_never_stops_or_stalls_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_MAX_BYTES", 100_000)
    with serve({}) as site:
        with pytest.raises(UsageError, match="sends more than the limit of 100,000 bytes"):
            load_image(LocalAddress(f"{site.url}/endless"))
        monkeypatch.setattr(sources, "_STEP_SECONDS", 0.1)
        with pytest.raises(NetworkError, match="timed out"):
            load_image(LocalAddress(f"{site.url}/hangs"))
        monkeypatch.setattr(vision, "_SECONDS", 0.05)
        monkeypatch.setattr(vision, "_MAX_BYTES", 1 << 30)
        with pytest.raises(NetworkError, match="too slow"):
            load_image(LocalAddress(f"{site.url}/endless"))


@pytest.mark.parametrize(("url", "kind"), [("http://127.0.0.1:9/a.png", NetworkError), ("http://", UsageError)])
def test_an_address_where_nobody_is(url: str, kind: type[QtoolError]) -> None:
    with pytest.raises(kind, match="Cannot read the picture"):
        load_image(LocalAddress(url))


def bomb(width: int, height: int) -> bytes:
    """A PNG of that many pixels in a few bytes; only its header is ever read."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(100_000, 100_000))
    with pytest.raises(UsageError, match=r"bomb\.png: .*decompression bomb"):
        load_image(tmp_path / "bomb.png")


def test_a_large_picture_is_read_without_a_warning_as_the_official_loader_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RED.resize((200, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 15_000
    )  # pillow warns from here on, which the tests take for an error
    assert load_image(tmp_path / "large.png").size == (200, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
    with pytest.raises(UsageError, match="decompression bomb"):
        load_image(tmp_path / "large.png")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"moving.{kind.lower()}"
    RED.save(path, kind, save_all=True, append_images=[Image.new("RGB", RED.size, "blue")], lossless=True)
    assert np.abs(np.asarray(load_image(path), dtype=int) - [255, 0, 0]).max() <= 1


def test_a_cmyk_file_becomes_the_rgb_that_pillow_makes_of_it(tmp_path: Path) -> None:
    RED.convert("CMYK").save(tmp_path / "print.jpg")
    with Image.open(tmp_path / "print.jpg") as image:
        assert image.mode == "CMYK"
        assert load_image(tmp_path / "print.jpg").tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(("size", "grid"), [((1, 1), (1, 4, 4)), ((1, 200), (1, 12, 2)), ((150, 1), (1, 2, 10))])
def test_pictures_of_one_pixels_width_grow_to_the_least_size(size: tuple[int, int], grid: tuple[int, int, int]) -> None:
    assert patchify(Image.new("RGB", size)).grid_thw == grid


def test_a_picture_that_limits_leave_no_room_for_is_refused() -> None:
    with pytest.raises(UsageError, match="1000x10 pixels has no pixels left"):
        fitted(10, 1000, 32, 1024, 1024)
    for wrong in ({"min_pixels": 4000, "max_pixels": 3000}, {"min_pixels": 0}, {"total_pixels": 0}):
        with pytest.raises(UsageError):
            PixelLimits(**wrong)
    assert patchify(RED, PixelLimits(min_pixels=1024, max_pixels=1024)).placeholder_tokens == 1
    assert patchify(RED, OFFICIAL_LIMITS).placeholder_tokens == 6


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_of_every_kind_are_errors_and_never_something_else(kind: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    whole = encoded(noise, kind)
    random = np.random.default_rng(1)
    refused = 0
    for place in range(60):
        content = bytearray(whole[: random.integers(1, len(whole))] if place % 2 else whole)
        for at in random.integers(0, len(content), 5):
            content[at] = random.integers(0, 256)
        path = tmp_path / f"{place}.{kind.lower()}"
        path.write_bytes(content)
        try:
            load_image(path)
        except UsageError as error:
            refused += 1
            assert path.name in error.message  # noqa: PT017 - whether it raises is not known beforehand
    assert refused > 10


def test_a_data_url_needs_no_type_and_a_folder_or_device_is_no_picture(tmp_path: Path) -> None:
    assert load_image(f"data:;base64,{base64.b64encode(encoded(RED)).decode()}").size == RED.size
    for path in (str(tmp_path), "/dev/zero", "a\0b", "x" * 5000):
        with pytest.raises(UsageError, match="No such file"):
            load_image(path)


@pytest.mark.parametrize("host", ["a..b", f"{'x' * 64}.org", "\ud83d.org"])
def test_a_host_that_no_name_service_knows_by_rule_is_no_address(host: str) -> None:
    with pytest.raises(UsageError, match=r"Cannot read the picture http://.*Invalid address"):
        load_image(f"http://{host}/x.png")


@pytest.mark.parametrize("proxy", ["gopher://proxy", "socks5://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_a_matter_of_the_machine(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    with pytest.raises(SetupError, match="Cannot create an HTTP client"):
        load_image("http://example.org/x.png")
