"""Whatever ends a conversion, nothing is left under the final name."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from tests.export.models import RERANKER, SIZES, random_model
from tests.tiny import text_config


def large(width):
    """A reranker of `width` * 768 bytes a layer."""
    return random_model(text_config({**SIZES, "intermediate_size": width}, tied=True), like=RERANKER)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A quarter of a gigabyte: long enough to be interrupted."""
    return large(320_000)(tmp_path_factory.mktemp("large") / "model")


def command(model, output, *more):
    return [sys.executable, "-m", "qtool", "convert-gguf", str(model), "-o", str(output), "--outtype", "f16", *more]


def started(process, partial):
    deadline = time.monotonic() + 60
    while not any(partial.glob("*.gguf")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.parametrize("name", ["out", "one.gguf"])
def test_kill_9_leaves_no_output_and_a_rerun_succeeds(name, model, tmp_path):
    out, partial = tmp_path / name, tmp_path / f"{name}.partial"
    with subprocess.Popen(command(model, out)) as process:
        started(process, partial)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed: make the model larger"
    assert not out.exists()
    assert partial.exists()
    subprocess.run(command(model, out), check=True, capture_output=True)
    assert out.exists()
    assert not partial.exists()


def test_ctrl_c_leaves_nothing_and_exits_130(model, tmp_path):
    with subprocess.Popen(command(model, tmp_path / "out"), stderr=subprocess.PIPE, text=True) as process:
        started(process, tmp_path / "out.partial")
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert list(tmp_path.iterdir()) == []


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG instead of killing the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_disk_that_fills_up_midway_leaves_nothing(model, tmp_path):
    run = subprocess.run(
        command(model, tmp_path / "out"), preexec_fn=limit_file_size, capture_output=True, text=True, check=False
    )
    assert run.returncode == 4, run.stderr
    assert "disk filled up" in run.stderr
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Peak RSS of whole processes: eight times the weights may not take a tenth more."""
    peaks = [peak_rss(tmp_path / str(width), width) for width in (40_000, 320_000)]
    assert peaks[1] < 1.1 * peaks[0]


def peak_rss(folder, width):
    folder.mkdir()
    model = large(width)(folder / "model")
    script = "import resource, sys; from qtool import convert_gguf, ConvertOptions; from pathlib import Path;"
    script += "convert_gguf(ConvertOptions(model=sys.argv[1], output=Path(sys.argv[2]), outtypes=('q8_0',)));"
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    run = subprocess.run(
        [sys.executable, "-c", script, model, folder / "out"], capture_output=True, text=True, check=True
    )
    return int(run.stdout)
