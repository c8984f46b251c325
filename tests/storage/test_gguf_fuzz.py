"""Whatever is done to a real file, the reader answers or refuses in words, quickly and with little memory.

`make fuzz` runs many thousands of cases; the suite a few hundred.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
import tracemalloc

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtool.errors import ModelError
from qtool.storage.gguf import parse_gguf

EXAMPLES = int(os.environ.get("QTOOL_FUZZ_EXAMPLES", "200"))
HOSTILE = [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
fuzz = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))


class Bytes:
    """A file in memory."""

    name, chunk = "fuzzed", 1 << 12

    def __init__(self, content):
        self._content = content
        self.size = len(content)

    def read(self, offset, nbytes):
        return self._content[offset : offset + nbytes]


def assert_answered_or_refused(content):
    started = time.perf_counter()
    tracemalloc.start()
    with contextlib.suppress(ModelError):  # nothing else may come
        gguf = parse_gguf(Bytes(content))
        assert all(t.offset + t.nbytes <= len(content) for t in gguf.tensors.values())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (1 << 20) + 60 * len(content)
    assert time.perf_counter() - started < 2


@fuzz
@given(content=st.binary(max_size=400))
def test_any_bytes(content):
    assert_answered_or_refused(content)
    assert_answered_or_refused(b"GGUF" + struct.pack("<I", 3) + content)


@fuzz
@given(seed=st.integers(0, 1 << 32))
def test_real_files_with_changed_bytes(seed, model):
    chance = random.Random(seed)
    content = bytearray(model.read_bytes())
    for _ in range(chance.randint(1, 8)):
        content[chance.randrange(len(content))] = chance.randrange(256)
    assert_answered_or_refused(bytes(content))


@fuzz
@given(seed=st.integers(0, 1 << 32))
def test_real_files_with_hostile_numbers(seed, model):
    chance = random.Random(seed)
    content = bytearray(model.read_bytes())
    for _ in range(chance.randint(1, 3)):
        layout = chance.choice(["<I", "<Q"])
        place = chance.randrange(len(content) - 8)
        number = chance.choice(HOSTILE) & (256 ** struct.calcsize(layout) - 1)
        struct.pack_into(layout, content, place, number)
    assert_answered_or_refused(bytes(content))


@fuzz
@given(seed=st.integers(0, 1 << 32))
def test_real_files_with_parts_moved_doubled_or_lost(seed, model):
    chance = random.Random(seed)
    content = model.read_bytes()
    start, end = sorted(chance.randrange(len(content)) for _ in range(2))
    place = chance.randrange(len(content))
    part = content[start:end]
    changed = chance.choice([
        content[:start] + content[end:],
        content[:place] + part + content[place:],
        content[:place] + part + content[place + len(part) :],
        content + part,
    ])  # fmt: skip
    assert_answered_or_refused(changed)
