"""What is written is read back, by qtool and by the gguf package; what is broken is refused in words."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.constants import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import ModelError
from qtool.formats.ggml import F32
from qtool.storage.gguf import CODES, MAX_HEADER, Value, array, encode_string, encode_value, read_gguf, string
from qtool.storage.gguf_layout import GgufOutputTensor
from tests.storage.conftest import METADATA, TENSORS, write


def test_a_written_file_is_read_back(model):
    gguf = read_gguf(model)
    assert gguf.metadata == METADATA
    assert [(t.gguf_name, t.type, t.shape, t.nbytes) for t in gguf.tensors.values()] == [
        (t.gguf_name, t.type, t.shape, t.nbytes) for t in TENSORS
    ]
    data = model.read_bytes()
    for tensor in gguf.tensors.values():
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == np.arange(tensor.nbytes, dtype=np.uint8).tobytes()


def test_the_gguf_package_reads_the_same(model):
    theirs = GGUFReader(model)
    ours = read_gguf(model)
    assert {t.name: (t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        name: (t.offset, t.nbytes) for name, t in ours.tensors.items()
    }
    for key, value in ours.metadata.items():
        assert theirs.get_field(key).contents() == value.data


def test_parts_are_tied_together(tmp_path):
    paths = write(tmp_path, max_bytes=200)
    parts = [read_gguf(path) for path in paths]
    assert [path.name for path in paths] == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    assert [part.get("split.no") for part in parts] == [0, 1]
    assert {part.get("split.count") for part in parts} == {2}
    assert {part.get("split.tensors.count") for part in parts} == {3}
    assert [list(part.tensors) for part in parts] == [["a.weight"], ["odd", "b.weight"]]
    assert len(parts[1].metadata) == 4


NUMBERS = {
    kind: st.floats(width=32 if code == "f" else 64, allow_nan=False) if code in "fd"
    else st.booleans() if code == "?"
    else st.integers(-(256 ** struct.calcsize(code)) // 2 if code.islower() else 0, 256 ** struct.calcsize(code) // 2 - 1)
    for kind, code in CODES.items()
}  # fmt: skip
SCALARS = st.one_of(
    *(st.builds(Value, st.just(kind), numbers) for kind, numbers in NUMBERS.items()), st.builds(string, st.text())
)
ARRAYS = st.one_of(
    *(st.builds(array, st.just(kind), st.lists(numbers, max_size=5)) for kind, numbers in NUMBERS.items()),
    st.builds(array, st.just(GGUFValueType.STRING), st.lists(st.text(), max_size=5)),
)


@given(st.dictionaries(st.text(min_size=1, max_size=20), SCALARS | ARRAYS, max_size=6))
def test_any_metadata_comes_back_with_its_types(tmp_path_factory, fields):
    fields = {key: value for key, value in fields.items() if key != "general.alignment"}
    metadata = {"general.architecture": string("x"), **fields}
    (path,) = write(tmp_path_factory.mktemp("any"), [GgufOutputTensor("t", F32, (1,), 4)], metadata)
    assert read_gguf(path).metadata == metadata


def file_of(fields=(), tensors=b"", counts=None, data=b"", version=3, magic=b"GGUF"):
    """A file put together by hand."""
    fields = list(fields)
    tensor_count, field_count = counts or (1 if tensors else 0, len(fields))
    header = magic + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join(fields) + tensors
    return header + bytes(-len(header) % 32) + data


def field(key, value):
    return encode_string(key) + encode_value(value)


def tensor(name="t", sizes=(4,), number=0, offset=0):
    return encode_string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)


HUGE = 1 << 60
BROKEN = {
    "empty": (b"", "is truncated"),
    "no-magic": (file_of(magic=b"GGML"), "is not a GGUF file"),
    "version-1": (file_of(version=1), "is GGUF version 1"),
    "big-endian": (file_of(version=3 << 24), "big-endian"),
    "too-many-fields": (file_of(counts=(0, HUGE)), "metadata fields cannot fit"),
    "too-many-tensors": (file_of(counts=(HUGE, 0)), "tensors cannot fit"),
    "absurd-key": (file_of([struct.pack("<Q", HUGE) + b"k" * 40], counts=(0, 1)), "at most 65,535"),
    "absurd-string": (file_of([encode_string("k") + struct.pack("<IQ", 8, HUGE) + bytes(9)]), "expected at most|cannot fit"),
    "absurd-array": (file_of([encode_string("k") + struct.pack("<IIQ", 9, 4, HUGE)]), "elements of the value of 'k'"),
    "absurd-strings": (file_of([encode_string("k") + struct.pack("<IIQ", 9, 8, HUGE)]), "strings of the value of 'k'"),
    "nested-array": (file_of([encode_string("k") + struct.pack("<IIQ", 9, 9, 1)]), "array of arrays"),
    "unknown-kind": (file_of([encode_string("k") + struct.pack("<I", 77) + bytes(8)]), "unknown type 77"),
    "twice-a-key": (file_of([field("k", string("a")), field("k", string("b"))]), "'k' appears twice"),
    "alignment-of-12": (file_of([field("general.alignment", Value(GGUFValueType.UINT32, 12))]), "expected a power of two"),
    "alignment-as-text": (file_of([field("general.alignment", string("32"))]), "expected a power of two"),
    "twice-a-tensor": (file_of(tensors=tensor() + tensor(offset=32), counts=(2, 0), data=bytes(64)), "t appears twice"),
    "long-name": (file_of(tensors=tensor("t" * 65), data=bytes(32)), "at most 64"),
    "five-dimensions": (file_of(tensors=tensor(sizes=(1,) * 5), data=bytes(32)), "5 dimensions"),
    "no-dimension": (file_of(tensors=tensor(sizes=()), data=bytes(32)), "0 dimensions"),
    "zero-size": (file_of(tensors=tensor(sizes=(0, 4)), data=bytes(32)), "impossible shape"),
    "endless-shape": (file_of(tensors=tensor(sizes=(HUGE, HUGE)), data=bytes(32)), "impossible shape"),
    "unknown-tensor-type": (file_of(tensors=tensor(number=999), data=bytes(32)), "unknown type 999"),
    "part-of-a-block": (file_of(tensors=tensor(sizes=(33,), number=8), data=bytes(64)), "needs a multiple of 32"),
    "unaligned": (file_of(tensors=tensor(offset=4), data=bytes(64)), "expected 0"),
    "out-of-order": (
        file_of(tensors=tensor("a", offset=32) + tensor("b"), counts=(2, 0), data=bytes(64)), "expected 0"),
    "overlapping": (file_of(tensors=tensor("a") + tensor("b"), counts=(2, 0), data=bytes(64)), "expected 32"),
    "beyond-the-file": (file_of(tensors=tensor(sizes=(4096,)), data=bytes(64)), "is truncated: t ends"),
    "longer": (file_of(tensors=tensor(), data=bytes(4096)), "longer than its header"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_gguf(tmp_path / "broken.gguf")
    assert ("again" in caught.value.hint) or "truncated" not in message


def test_every_truncation_is_refused(model, tmp_path):
    content = model.read_bytes()
    end = max(t.offset + t.nbytes for t in read_gguf(model).tensors.values())
    for length in range(end):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ModelError):
            read_gguf(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(content[:end])
    assert read_gguf(tmp_path / "cut").tensors.keys() == {t.gguf_name for t in TENSORS}


def test_a_header_beyond_the_limit_costs_nothing(tmp_path):
    path = tmp_path / "sparse"
    path.write_bytes(file_of([encode_string("k") + struct.pack("<IQ", 8, MAX_HEADER)], counts=(0, 1)))
    with path.open("r+b") as file:
        file.truncate(4 * MAX_HEADER)
    with pytest.raises(ModelError, match="would make the header larger"):
        read_gguf(path)


def test_bytes_that_are_no_text_survive(tmp_path):
    raw = encode_string("k") + struct.pack("<IQ", 8, 3) + b"\xff\xfe\x00"
    (tmp_path / "odd").write_bytes(file_of([raw]))
    value = read_gguf(tmp_path / "odd").metadata["k"]
    assert encode_string("k") + encode_value(value) == raw


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ModelError, match="No such file"):
        read_gguf(tmp_path / "nothing.gguf")
