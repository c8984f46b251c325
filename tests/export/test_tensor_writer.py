"""The writer of tensors by itself, on sources that are made up."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from qtool.errors import ModelError
from qtool.export import tensor_writer
from qtool.export.tensor_writer import Encoded, TensorChunk, TensorSource, write_tensors
from qtool.progress import Meter, ignore
from qtool.storage.shards import OutputTensor, lay_out

CHUNKS, SIZE = 5, 100


class Counting(TensorSource):
    """A tensor of CHUNKS * SIZE bytes; it must be measured in full before it is encoded."""

    def __init__(self, name, log, *, is_measured=True, fails=""):
        self.name, self.log, self.is_measured, self.fails = name, log, is_measured, fails
        self.measured = 0

    @property
    def work_bytes(self):
        return (1 + self.is_measured) * CHUNKS * SIZE

    def measurements(self):
        for _ in range(CHUNKS if self.is_measured else 0):
            yield TensorChunk(SIZE, self._measure)

    def _measure(self):
        time.sleep(0.001)
        self.log.append(("measure", self.name))
        self.measured += 1
        self._fail("measuring")
        return ()

    def chunks(self):
        assert self.measured == (CHUNKS if self.is_measured else 0)
        for number in range(CHUNKS):
            yield TensorChunk(SIZE, lambda number=number: self._encode(number))

    def _encode(self, number):
        self.log.append(("encode", self.name))
        self._fail("encoding")
        return (Encoded(self.name, number * SIZE, np.full(SIZE, number, np.uint8)),)

    def _fail(self, stage):
        if self.fails == stage:
            raise ModelError(f"{self.name} is broken.")


def write(sources, folder, advance=ignore):
    folder.mkdir(exist_ok=True)
    layout = lay_out([OutputTensor(s.name, "U8", (CHUNKS * SIZE,), CHUNKS * SIZE) for s in sources], 1200)
    return write_tensors(layout.shards, sources, folder, advance)


@pytest.fixture(params=[1, 2, 7])
def workers(request, monkeypatch):
    """Any number of threads."""
    monkeypatch.setattr("qtool.workers.WORKERS", request.param)
    monkeypatch.setattr(tensor_writer, "WORKERS", request.param)
    return request.param


@pytest.mark.usefixtures("workers")
def test_a_source_is_encoded_once_it_is_measured_and_progress_adds_up(tmp_path):
    log, steps = [], []
    sources = [Counting(f"t{number:02}", log, is_measured=number % 3 > 0) for number in range(20)]
    meter = Meter(sum(source.work_bytes for source in sources), lambda *step: steps.append(step))
    hashes = write(sources, tmp_path / "out", meter.advance)
    assert steps[-1][0] == steps[-1][1] == sum(source.work_bytes for source in sources)
    assert len(hashes) == len(list((tmp_path / "out").iterdir())) == 10
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes().endswith(2 * b"".join(bytes([number] * SIZE) for number in range(CHUNKS)))


def test_sources_are_measured_ahead_but_not_all_at_once(tmp_path):
    log = []
    write([Counting(f"t{number:02}", log) for number in range(40)], tmp_path / "out")
    first_encoded = log.index(("encode", "t00"))
    ahead = {name for stage, name in log[:first_encoded] if stage == "measure"}
    assert "t01" in ahead
    assert len(ahead) < 40


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("fails", ["measuring", "encoding"])
def test_an_error_ends_the_run_and_no_thread_goes_on(fails, tmp_path):
    log = []
    sources = [Counting(f"t{number:02}", log, fails=fails if number == 3 else "") for number in range(100)]
    with pytest.raises(ModelError, match="t03 is broken"):
        write(sources, tmp_path / "out")
    assert ("encode", "t99") not in log
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]


def test_the_queue_does_not_grow_with_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_writer, "_QUEUED", 3)
    asked, done = [], []

    class Long(Counting):
        def chunks(self):
            for chunk in super().chunks():
                asked.append(chunk)
                assert len(asked) - len(done) <= 3 + 1 + tensor_writer.WORKERS
                yield chunk

    write([Long("t", [], is_measured=False)], tmp_path / "out", done.append)
    assert len(done) == CHUNKS
