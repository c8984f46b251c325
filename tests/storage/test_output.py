"""Layouts, atomic folders, hashing while writing."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from qtool.errors import SetupError, UsageError
from qtool.storage.atomic import require_space, staged_folder
from qtool.storage.checkpoint import find_sidecars
from qtool.storage.hashing import sha256_of, sha256_of_part
from qtool.storage.output_files import open_files
from qtool.storage.shards import OutputTensor, lay_out

WIDTH = {"F32": 4, "BF16": 2, "U8": 1}


def tensor(name, dtype="BF16", count=8):
    return OutputTensor(name, dtype, (count,), count * WIDTH[dtype])


@given(
    st.lists(st.tuples(st.sampled_from(list(WIDTH)), st.integers(0, 50)), min_size=1, max_size=20), st.integers(1, 200)
)
def test_layouts_are_gapless_aligned_and_complete(parts, max_bytes):
    tensors = [tensor(f"t{i}", dtype, count) for i, (dtype, count) in enumerate(parts)]
    layout = lay_out(tensors, max_bytes)
    placed = {name: (shard, offset) for shard in layout.shards for name, (offset, _) in shard.ranges.items()}
    assert len(placed) == len(tensors)
    for each in tensors:
        assert placed[each.hf_name][1] % WIDTH[each.dtype] == 0
    for shard in layout.shards:
        data = shard.nbytes - len(shard.header)
        assert data <= max_bytes or len(shard.ranges) == 1 or data == max((t.nbytes for t in tensors), default=0)
    assert (layout.index == b"") == (len(layout.shards) == 1)


def test_a_written_shard_is_read_by_safetensors_and_hashed_right(tmp_path):
    tensors = [tensor("narrow", "U8", 5), tensor("wide", "F32", 3)]
    (shard,) = lay_out(tensors, 1 << 20).shards
    with open_files([shard], tmp_path) as files:
        files.write("narrow", 2, np.array([3, 4, 5], np.uint8))
        files.write("wide", 0, np.array([1, 2, 3], np.float32).view(np.uint8))
        files.write("narrow", 0, np.array([1, 2], np.uint8))
        digest = files.sha256()[shard.file_name]
    path = tmp_path / shard.file_name
    assert [digest] == sha256_of([path]) == [hashlib.sha256(path.read_bytes()).hexdigest()]
    with safe_open(path, "np") as read:
        assert read.get_tensor("narrow").tolist() == [1, 2, 3, 4, 5]
        assert read.get_tensor("wide").tolist() == [1, 2, 3]


@pytest.mark.parametrize("hash_tensors", [False, True])
def test_files_are_hashed_as_they_are_completed_by_threads_in_any_order(hash_tensors, tmp_path):
    random = Random(0)
    contents = {f"t{i}": random.randbytes(random.choice([1, 55, 64, 1 << 20, 3_000_001])) for i in range(11)}
    layout = lay_out([tensor(name, "U8", len(content)) for name, content in contents.items()], 1 << 22)
    parts = [
        (name, start, end)
        for name, content in contents.items()
        for start, end in pairwise(sorted({0, len(content), *(random.randint(0, len(content)) for _ in range(10))}))
    ]
    random.shuffle(parts)
    with open_files(layout.shards, tmp_path, hash_tensors=hash_tensors) as files, ThreadPoolExecutor(8) as pool:
        for name, start, end in parts:
            pool.submit(files.write, name, start, np.frombuffer(contents[name][start:end], np.uint8))
        pool.shutdown()
        digests = dict(files.sha256())
    written = {shard.file_name: (tmp_path / shard.file_name).read_bytes() for shard in layout.shards}
    assert len(written) > 1
    expected = written
    if hash_tensors:
        headers = {f"header of {shard.file_name}": shard.header for shard in layout.shards}
        expected = {**headers, **contents}
    assert digests == {name: hashlib.sha256(content).hexdigest() for name, content in expected.items()}


def test_parts_of_files_are_hashed(tmp_path):
    content = Random(0).randbytes(3_000_001)
    (tmp_path / "file").write_bytes(content)
    for start, nbytes in [(0, 0), (0, 1), (7, 1 << 20), (1, 3_000_000)]:
        expected = hashlib.sha256(content[start : start + nbytes]).hexdigest()
        assert sha256_of_part(tmp_path / "file", start, nbytes) == expected
    with pytest.raises(OSError, match="ends at byte 3,000,001"):
        sha256_of_part(tmp_path / "file", 1, 3_000_001)


def test_the_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "out"
    with staged_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_run_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "file").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError), staged_folder(tmp_path / "out") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path):
    (tmp_path / "out.partial" / "deep").mkdir(parents=True)
    (tmp_path / "out.partial" / "old").write_text("x")
    with staged_folder(tmp_path / "out") as folder:
        assert list(folder.iterdir()) == []


def test_an_existing_target_is_refused_and_replaced_only_by_force_and_only_if_ours(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    with pytest.raises(UsageError, match="exists"), staged_folder(target):
        pass
    with pytest.raises(UsageError, match="was not made by qtool"), staged_folder(target, force=True):
        pass
    (target / "qtool.json").write_text("{}")
    with staged_folder(target, force=True) as folder:
        (folder / "new").write_text("y")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_two_runs_cannot_write_the_same_folder(tmp_path):
    with (
        staged_folder(tmp_path / "out"),
        pytest.raises(UsageError, match="Another run"),
        staged_folder(tmp_path / "out"),
    ):
        pass
    assert (tmp_path / "out").exists()


def test_too_little_space_is_told_before_the_start(tmp_path):
    with pytest.raises(SetupError, match="needs 1,000,000,000,000,000,000 bytes"):
        require_space(tmp_path / "not" / "yet", 10**18)


def test_a_full_disk_is_explained(tmp_path):
    with pytest.raises(SetupError, match="filled up"), staged_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")


def test_a_place_below_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file/out could not be written"), staged_folder(tmp_path / "file" / "out"):
        pytest.fail("nothing can be written there")


def test_sidecars_are_found_and_weights_are_not(tmp_path):
    wanted = [
        "1_LogitScore/config.json", "additional_chat_templates/rerank.jinja", "chat_template.jinja",
        "generation_config.json", "modules.json", "tokenizer.json",
    ]  # fmt: skip
    for name in [*wanted, "model.safetensors", "config.json", "README.md", "pytorch_model.bin"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [path.as_posix() for path in find_sidecars(tmp_path)] == wanted
