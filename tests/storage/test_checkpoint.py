"""Broken safetensors files, named by what is broken, and whole ones."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtool.errors import ModelError
from qtool.storage.checkpoint import open_checkpoint, read_header

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [1], "data_offsets": [16, 20]}


def container(header, data=b"\0" * 20, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


BROKEN = {
    "empty file": (b"", "truncated or not a safetensors"),
    "header beyond the file": (container({}, b"", length=1 << 20), "truncated or not a safetensors"),
    "header of absurd length": (container({}, b"", length=1 << 62), "truncated or not a safetensors"),
    "header not JSON": (container(b"{nope", b""), "unreadable header"),
    "header not UTF-8": (container(b'{"\xff": 1}', b""), "unreadable header"),
    "header nested too deep": (container(b"[" * 100_000, b""), "unreadable header"),
    "header a list": (container([1], b""), "not a JSON object"),
    "truncated data": (container({"a": A, "b": B}, b"\0" * 19), "truncated"),
    "data too long": (container({"a": A, "b": B}, b"\0" * 21), "longer than its header says"),
    "overlapping tensors": (container({"a": A, "b": {**B, "data_offsets": [12, 16]}}, b"\0" * 16), "overlaps"),
    "hole between tensors": (container({"a": A, "b": {**B, "data_offsets": [17, 21]}}, b"\0" * 21), "leaves a hole"),
    "size of another shape": (container({"a": {**A, "shape": [2, 3]}}, b"\0" * 16), "needs 24 bytes"),
    "unknown dtype": (container({"a": {**A, "dtype": "F9"}}, b"\0" * 16), "unknown type 'F9'"),
    "negative size": (container({"a": {**A, "shape": [-2, -2]}}, b"\0" * 16), "impossible shape"),
    "negative offset": (container({"a": {**A, "data_offsets": [-16, 0]}}, b"\0" * 16), "its offsets span"),
    "missing offsets": (
        container({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
        "lacks dtype, shape or data_offsets",
    ),
    "name twice": (container(b'{"a": {}, "a": {}}', b""), "'a' appears twice"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_refused_with_the_reason(broken, tmp_path):
    content, reason = BROKEN[broken]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert ("again" in caught.value.hint) or "truncated" not in reason


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_any_single_corrupt_byte_is_refused_or_harmless(position, value, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    save_file({"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        infos = read_header(path)
    except ModelError:
        return
    assert sum(info.nbytes for info in infos) <= len(content)


def test_reading_is_what_safetensors_wrote(tmp_path):
    tensors = {
        "w": torch.randn(3, 5).to(torch.bfloat16),
        "s": torch.tensor(1.5),
        "u": torch.arange(7, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["w"].dtype == "BF16"
    assert np.array_equal(checkpoint.read("w"), tensors["w"].view(torch.uint16).numpy())
    assert checkpoint.read("s").shape == ()
    assert checkpoint.read("s")[()] == 1.5
    assert checkpoint.read("u").tolist() == list(range(7))


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    (tmp_path / "config.json").write_text("{}")

    def write_index(weight_map):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return tmp_path

    return write_index


def test_a_sharded_checkpoint_is_read_whole(sharded):
    folder = sharded({"a": "one.safetensors", "b": "two.safetensors"})
    assert set(open_checkpoint(folder).tensors) == {"a", "b"}


INDICES = {
    "missing shard": ({"a": "one.safetensors", "b": "three.safetensors"}, "names three.safetensors, which is missing"),
    "tensor in another shard": ({"a": "two.safetensors", "b": "one.safetensors"}, "does not hold it"),
    "tensor nowhere": ({"a": "one.safetensors", "c": "two.safetensors"}, "c is in two.safetensors"),
    "path out of the folder": ({"a": "../one.safetensors"}, "not a file name"),
    "no weight map": (None, "no `weight_map`"),
}


@pytest.mark.parametrize("broken", INDICES)
def test_broken_indices_are_refused_with_the_reason(broken, sharded):
    weight_map, reason = INDICES[broken]
    with pytest.raises(ModelError, match=reason):
        open_checkpoint(sharded(weight_map))


def test_the_same_tensor_in_two_shards_is_refused(sharded, tmp_path):
    folder = sharded({"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match=r"a is in both one\.safetensors and two\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"{nope", b"[]", b"\xff\xfe"])
def test_an_unreadable_config_names_the_file(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)
