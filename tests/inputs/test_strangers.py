"""Panels from strangers: they name files in their own folder and public addresses, and ask for no more than fits."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import httpcore
import httpx
import pytest
from PIL import Image

import qtool
from qtool import transfer
from qtool.errors import NetworkError, QtoolError, UsageError
from qtool.inputs.datasets import load_dataset_panel, parse_dataset
from qtool.inputs.items import Video
from qtool.inputs.media import LocalAddress, MediaAccess, open_media
from qtool.inputs.panels import load_panel
from qtool.inputs.pictures import FORMATS, load_image
from qtool.inputs.videos import read_frames
from tests.hostile import ENDLESS, WRONG, answer, serving_raw
from tests.inputs.films import Film
from tests.inputs.site import serve

RED = Image.new("RGB", (40, 30), "red")


def encoded(image, kind="PNG"):
    target = BytesIO()
    image.save(target, kind)
    return target.getvalue()


@pytest.fixture
def panel(tmp_path):
    """Write a panel that names one picture."""
    folder = tmp_path / "panel"
    folder.mkdir()
    RED.save(tmp_path / "secret.png")
    RED.save(folder / "red.png")

    def write(source, field="image"):
        path = folder / "panel.jsonl"
        path.write_text(json.dumps({"query": {field: source}, "documents": ["a", "b"]}))
        return path

    return write


# Files.


def outside(tmp_path):
    folder = tmp_path / "panel"
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "up/secret.png",
        "red.png/../../secret.png",
        "loop.png",
        "/dev/zero",
        "/proc/self/environ",
        "~/.ssh/id_rsa",
        "file:///etc/passwd",
    ]


def test_files_outside_of_the_panels_folder_are_refused(panel, tmp_path):
    for source in outside(tmp_path):
        for field, value in (("image", source), ("video", source), ("video", {"frames": [source, "red.png"]})):
            with pytest.raises(UsageError, match=r"outside of the panel's folder|No such file"):
                load_panel(panel(value, field))
    with pytest.raises(UsageError) as caught:
        load_panel(panel("../secret.png"))
    assert "--allow-outside-files" in caught.value.hint


def test_files_inside_and_allowed_ones_are_read(panel, tmp_path):
    (tmp_path / "panel" / "inner").mkdir()
    (tmp_path / "panel" / "inner" / "link.png").symlink_to("../red.png")
    (tmp_path / "other").symlink_to(tmp_path / "panel")
    for source in ("red.png", "./red.png", "inner/../red.png", "inner/link.png", str(tmp_path / "panel" / "red.png")):
        (found,) = load_panel(panel(source)).queries[0].item.image
        assert load_image(found).size == RED.size
    panel("red.png")
    assert load_panel(tmp_path / "other" / "panel.jsonl").queries  # the folder itself may be a link
    assert load_panel(panel("../secret.png"), MediaAccess(outside_files=True)).queries


def test_a_row_of_a_data_set_names_files_of_the_data_set_only(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    RED.save(tmp_path / "secret.png")
    RED.save(folder / "red.png")
    for source in (str(tmp_path / "secret.png"), "file:///etc/passwd", "zip://a.png::http://127.0.0.1:9/a.zip"):
        rows = [{"q": f"q{n}", "p": {"path": path, "bytes": None}} for n, path in enumerate([source, source])]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        spec = parse_dataset(str(folder / "rows.jsonl"), "query=q,positive_image=p")
        with pytest.raises(UsageError, match=r"outside of the panel's folder|not on the Hub"):
            load_dataset_panel(spec)
    rows = [{"q": f"q{n}", "p": {"path": str(folder / "red.png"), "bytes": None}} for n in range(2)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match="no documents to draw negatives from"):  # both are one picture, which was read
        load_dataset_panel(spec)


# Addresses.

LOCAL = (
    *(
        "127.0.0.1",
        "localhost",
        "localhost.",
        "0.0.0.0",  # noqa: S104 - nothing listens there
        "127.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
    ),
    *(
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ),
    *("169.254.169.254", "[fe80::1]", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "[fc00::1]", "[fec0::1]"),
    *("224.0.0.1", "255.255.255.255", "240.0.0.1", "[ff02::1]", "192.0.2.1", "198.18.0.1", "[2001:db8::1]"),
    *("user:pass@127.0.0.1", "[::ffff:169.254.169.254]", "[64:ff9b::a9fe:a9fe]", "[2001:0:7f00:1::80ff:fffe]"),
)


@pytest.mark.parametrize("host", LOCAL)
def test_an_address_that_is_not_public_is_not_asked(host):
    # Some spellings are no address to httpx, or to the system.
    with pytest.raises(QtoolError, match=r"address is not public|Invalid address|Name or service"):
        load_image(f"http://{host}:9/a.png")


@pytest.fixture
def names(monkeypatch):
    """Names and the addresses that they lead to, one after the other each time that they are asked for."""
    known = {}
    real = socket.getaddrinfo

    def getaddrinfo(host, port, *arguments, **options):
        name = host.decode() if isinstance(host, bytes) else host
        if name not in known:
            return real(host, port, *arguments, **options)
        address = known[name].pop(0) if len(known[name]) > 1 else known[name][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


def test_a_name_that_leads_here_is_not_asked_not_even_after_a_redirect_or_the_second_time(names, monkeypatch):
    monkeypatch.setattr("qtool.retries.FIRST_PAUSE", 0.01)
    with serve({"/red.png": encoded(RED)}) as site:
        port = site.url.rpartition(":")[2]
        names["evil.example"] = ["127.0.0.1"]
        with pytest.raises(UsageError, match=r"not public: evil\.example, which is 127\.0\.0\.1"):
            load_image(f"http://evil.example:{port}/red.png")
        # What is checked is what is connected to: a name that leads elsewhere the second time leads nowhere.
        names["rebinding.example"] = ["93.184.216.34", "127.0.0.1"]
        connected = []

        def connect(address, *_, **__):
            connected.append(address[0])
            raise OSError("no network in this test")

        with monkeypatch.context() as patch:
            patch.setattr(socket, "create_connection", connect)
            with pytest.raises(QtoolError):
                load_image(f"http://rebinding.example:{port}/red.png")
        assert connected == ["93.184.216.34"]
        assert site.asked == []


def test_a_redirect_to_an_address_that_is_not_public_is_refused(names, monkeypatch):
    """A public server that sends one on to this machine; the public one stands on loopback, as `public.example`."""
    real = transfer.is_public
    monkeypatch.setattr(transfer, "is_public", lambda address: address == "127.0.0.2" or real(address))
    names["public.example"] = ["127.0.0.2"]
    listener = socket.create_server(("127.0.0.2", 0))
    port = listener.getsockname()[1]
    listener.close()
    for target in (
        "http://127.0.0.1:9/a.png",
        "http://localhost:9/",
        "http://[::1]:9/",
        "file:///etc/passwd",
        "ftp://x/",
    ):
        mode = lambda *_, target=target: iter([answer("", "302 No", f"Location: {target}")])  # noqa: E731
        with (
            serving_raw(mode, host="127.0.0.2", port=port),
            pytest.raises(UsageError, match=r"not public|Invalid address"),
        ):
            load_image(f"http://public.example:{port}/a.png")


def test_the_options_let_a_panel_name_local_addresses(panel):
    with serve({"/red.png": encoded(RED)}) as site:
        (kept,) = load_panel(panel(f"{site.url}/red.png")).queries[0].item.image
        with pytest.raises(UsageError, match="not public") as caught:
            load_image(kept)
        assert "--allow-local-addresses" in caught.value.hint
        (kept,) = load_panel(panel(f"{site.url}/red.png"), MediaAccess(local_addresses=True)).queries[0].item.image
        assert load_image(kept).size == RED.size
        assert load_image(qtool.LocalAddress(f"{site.url}/red.png")).size == RED.size


def test_a_proxy_of_the_user_may_lie_here_and_is_asked_for_public_hosts_only(monkeypatch):
    with serve({"http://public.example/red.png": encoded(RED)}) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert load_image("http://public.example/red.png").size == RED.size  # a name that only the proxy knows
        for host in ("127.0.0.1", "localhost", "169.254.169.254"):
            with pytest.raises(UsageError, match="not public"):
                load_image(f"http://{host}/red.png")
        assert proxy.asked == ["http://public.example/red.png"]


def test_httpx_has_the_places_where_connections_are_guarded(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    client = transfer.guarded(httpx.Client(), allow_local=False)
    transports = [client._transport, *client._mounts.values()]
    backends = [each._pool._network_backend for each in transports if each is not None]
    assert len(backends) == 2
    assert all(isinstance(backend, transfer._Backend) for backend in backends)
    assert issubclass(httpcore.HTTPProxy, httpcore.ConnectionPool)


@pytest.mark.parametrize("mode", [*ENDLESS.values(), *WRONG.values()], ids=[*ENDLESS, *WRONG])
def test_a_site_that_means_ill_costs_little_time(mode, monkeypatch):
    monkeypatch.setattr("qtool.retries.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("qtool.inputs.pictures._SECONDS", 0.5)
    monkeypatch.setattr("qtool.inputs.pictures._MAX_BYTES", 1 << 20)
    with serving_raw(mode) as url, pytest.raises((UsageError, NetworkError)) as caught:
        load_image(LocalAddress(f"{url}/a.png"))
    assert "None" not in caught.value.message


def test_data_addresses_are_bounded():
    with pytest.raises(UsageError, match="more than 1,000 bytes"):
        open_media("data:;base64," + "A" * 2000, 1000, 1)
    assert open_media("data:;base64,QUJD", 1000, 1).getvalue() == b"ABC"


# Pictures and videos.


def test_pillow_takes_a_file_for_six_formats_and_nothing_else(tmp_path, monkeypatch):
    def run(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(os, "system", run)
    assert set(FORMATS) == {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"}
    for kind in FORMATS:
        assert load_image(f"data:;base64,{base64.b64encode(encoded(RED, kind)).decode()}").size == RED.size
    (tmp_path / "run.eps").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\nshowpage\n"
    )
    for kind in ("EPS", "PCX", "ICO", "TGA", "PPM", "PDF", "JPEG2000", "SGI", "DDS"):
        path = tmp_path / f"red.{kind.lower()}"
        if kind != "EPS":
            RED.save(path, kind)
        with pytest.raises(UsageError, match="expected PNG, JPEG, WebP, GIF, BMP or TIFF"):
            load_image(path if kind != "EPS" else tmp_path / "run.eps")
    RED.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[RED])
    assert load_image(tmp_path / "phone.jpg").size == RED.size  # a JPEG file to everybody else


def huge_png(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_no_picture_is_made_as_large_as_a_header_or_a_panel_says(panel, tmp_path):
    for size in ((1 << 30, 1 << 30), (100_000, 100_000), ((1 << 31) - 1, 1)):
        (tmp_path / "panel" / "huge.png").write_bytes(huge_png(*size))
        with pytest.raises(UsageError, match="Cannot read the picture"):
            load_image(tmp_path / "panel" / "huge.png")
    path = panel("red.png")
    for field, value in (("min_pixels", 10**12), ("max_pixels", 10**12), ("total_pixels", 10**15)):
        line = {"query": {"image": "red.png", field: value}, "documents": ["a"]}
        path.write_text(json.dumps(line))
        with pytest.raises(UsageError, match=f"{field}: "):
            load_panel(path)
    with pytest.raises(UsageError, match="max_frames: "):
        load_panel(panel({"file": "red.png", "max_frames": 10**9}, "video"))


def test_the_frames_that_are_kept_are_bounded_together(tmp_path, monkeypatch):
    film = Film(20).write(tmp_path / "film.mov")
    monkeypatch.setattr("qtool.inputs.videos._MAX_KEPT", 20_000)
    with pytest.raises(UsageError, match="frames have more than 20,000 bytes"):
        read_frames(str(film), lambda total, _: range(total))


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfilm.mov\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile film.mov\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>film.mov</BaseURL></MPD>',
    ],
)
def test_a_film_that_names_other_files_is_no_film(playlist, tmp_path):
    Film(20).write(tmp_path / "film.mov")
    for name in ("list.m3u8", "list.mov", "list.mp4"):
        (tmp_path / name).write_text(playlist)
        with pytest.raises(UsageError, match="It is broken"):
            read_frames(Video(str(tmp_path / name)).source, lambda total, _: range(total))


def test_the_command_line_has_the_options(panel):
    path = panel("../secret.png")
    with serving_raw(WRONG["no HTTP"]) as url:
        command = [sys.executable, "-m", "qtool", "score", url, "--panel", str(path)]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "The file is outside of the panel's folder: ../secret.png." in refused.stderr
        allowed = subprocess.run([*command, "--allow-outside-files"], capture_output=True, text=True, check=False)
        assert allowed.returncode == 5, allowed.stderr  # the panel was read, and then the server was asked
