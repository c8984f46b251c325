"""Whole runs: what is written, what is left when something goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtool.errors import ModelError, SetupError, UsageError
from qtool.export.quantize import QuantizeOptions, quantize
from tests.tiny import TEXT, read_bytes_of, text_config, vl_config, write_checkpoint

SIDE_FILES = {
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": "é\r\n".encode(),
    "additional_chat_templates/rerank.jinja": b"x",
    "modules.json": b'[{"type": "a.LogitScore"}]',
    "1_LogitScore/config.json": b"{}",
    "generation_config.json": b'{"odd":  "spacing"}',
    "preprocessor_config.json": b"{}",
}


@pytest.fixture
def model(tmp_path):
    folder = write_checkpoint(tmp_path / "model", vl_config())
    for name, content in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def nothing_but(folder, *names):
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_side_files_are_carried_byte_for_byte(model, tmp_path):
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "out"))
    for name, content in SIDE_FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_the_manifest_hashes_every_file_and_explains_every_tensor(model, tmp_path):
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "out", max_shard_bytes=100_000))
    out = tmp_path / "out"
    manifest = json.loads((out / "qtool.json").read_text())
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"qtool.json"}
    assert manifest["files"] == {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in sorted(files)}
    assert manifest["task"] == {"value": "rerank", "declared_by": "modules.json (LogitScore)"}
    assert manifest["recipe"]["sha256"] == hashlib.sha256(manifest["recipe"]["text"].encode()).hexdigest()
    written = {tensor["name"]: tensor for tensor in manifest["tensors"]}
    assert written.keys() == read_bytes_of(model).keys()
    errors = [t["relative_error"] for t in written.values() if t["action"] == "quantize"]
    assert all(0.05 < error < 0.15 for error in errors)  # normal weights lose about 9.5 %
    assert str(tmp_path) not in (out / "qtool.json").read_text()


def test_the_same_input_gives_the_same_folder(model, tmp_path):
    for name in ("a", "b"):
        quantize(QuantizeOptions(model=str(model), output=tmp_path / name))
    first = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    second = {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert first == second


def test_the_number_of_threads_changes_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr("qtool.export.tensor_writer.CHUNK_BYTES", 512)
    for workers in (1, 7):
        monkeypatch.setattr("qtool.workers.WORKERS", workers)
        quantize(QuantizeOptions(model=str(model), output=tmp_path / str(workers)))
    one, seven = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*.*")} for name in ("1", "7"))
    assert one == seven


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 60_000, 1])
def test_a_dry_run_is_exact_to_the_byte(max_shard_bytes, model, tmp_path):
    options = QuantizeOptions(model=str(model), output=tmp_path / "out", max_shard_bytes=max_shard_bytes)
    dry = quantize(QuantizeOptions(model=str(model), output=None, max_shard_bytes=max_shard_bytes, dry_run=True))
    assert nothing_but(tmp_path, "model")
    quantize(options)
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "qtool.json")
    assert dry.output_bytes == written


def test_shards_hold_what_one_file_holds(model, tmp_path):
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "one"))
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "many", max_shard_bytes=60_000))
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    assert read_bytes_of(tmp_path / "one") == read_bytes_of(tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_bytes_of(tmp_path / "many").keys()


def test_chunks_smaller_than_tensors_change_nothing(model, tmp_path, monkeypatch):
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "whole"))
    monkeypatch.setattr("qtool.export.tensor_writer.CHUNK_BYTES", 512)
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "chunks"))
    assert read_bytes_of(tmp_path / "whole") == read_bytes_of(tmp_path / "chunks")


@pytest.mark.parametrize("backend", ["streaming", "modelopt"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", float("nan"), r"up_proj\.weight holds 3 NaN or infinite"),
        ("model.embed_tokens.weight", float("inf"), r"embed_tokens\.weight holds 3 NaN or infinite"),
    ],
)
def test_nonfinite_weights_are_named_and_counted(backend, name, value, message, tmp_path):
    def spoil(tensors):
        tensors[name].view(-1)[:3] = value

    model = write_checkpoint(tmp_path / "model", text_config(), change=spoil)
    with pytest.raises(ModelError, match=message):
        quantize(QuantizeOptions(model=str(model), output=tmp_path / "out", backend=backend))
    assert nothing_but(tmp_path, "model")


@pytest.mark.parametrize("backend", ["streaming", "modelopt"])
def test_an_all_zero_layer_is_refused_for_modelopt_would_write_nan_scales(backend, tmp_path):
    def clear(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"].zero_()

    model = write_checkpoint(tmp_path / "model", text_config(), change=clear)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj: the largest magnitude is 0"):
        quantize(QuantizeOptions(model=str(model), output=tmp_path / "out", backend=backend))
    assert nothing_but(tmp_path, "model")


def test_mixed_types_stream_as_they_are_and_are_refused_by_modelopt(tmp_path):
    def widen(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    model = write_checkpoint(tmp_path / "model", text_config(), change=widen)
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "out"))
    assert read_bytes_of(tmp_path / "out")["model.norm.weight"][0] == "torch.float32"
    with pytest.raises(ModelError, match="mixes BF16 and F32"):
        quantize(QuantizeOptions(model=str(model), output=tmp_path / "other", backend="modelopt"))


def test_an_architecture_that_transformers_lacks_still_streams(tmp_path):
    config = {**vl_config(architecture="Qwen3VLForSequenceClassification"), "num_labels": 1}
    model = write_checkpoint(tmp_path / "model", config)
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "out"))
    assert read_bytes_of(tmp_path / "out")["score.weight"] == read_bytes_of(model)["score.weight"]
    with pytest.raises(SetupError, match="has no Qwen3VLForSequenceClassification"):
        quantize(QuantizeOptions(model=str(model), output=tmp_path / "other", backend="modelopt"))


def test_a_folder_has_no_revision(model, tmp_path):
    with pytest.raises(UsageError, match="is a local folder; --revision applies to Hub repositories only"):
        quantize(QuantizeOptions(model=str(model), output=tmp_path / "out", revision="main"))


def large(rows):
    """Many embedding rows: megabytes that are quick to make."""
    return text_config({**TEXT, "vocab_size": rows})


@pytest.fixture(scope="module")
def quarter_gigabyte(tmp_path_factory):
    """A model that takes about a second, most of it hashing: long enough to be interrupted."""
    return write_checkpoint(tmp_path_factory.mktemp("large") / "model", large(1_000_000))


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG instead of killing the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_disk_that_fills_up_midway_leaves_nothing(model, tmp_path):
    command = [sys.executable, "-m", "qtool", "quantize", str(model), "-o", str(tmp_path / "out")]
    run = subprocess.run(command, preexec_fn=limit_file_size, capture_output=True, text=True, check=False)
    assert run.returncode == 4, run.stderr
    assert "disk filled up" in run.stderr
    assert nothing_but(tmp_path, "model")


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1, 0.2])
def test_kill_9_leaves_no_output_and_a_rerun_succeeds(delay, quarter_gigabyte, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, "-m", "qtool", "quantize", str(quarter_gigabyte), "-o", str(out)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed: make the model larger"
    assert not out.exists()
    assert partial.exists()
    quantize(QuantizeOptions(model=str(quarter_gigabyte), output=out))
    assert nothing_but(tmp_path, "out")


def test_ctrl_c_leaves_nothing_and_exits_130(quarter_gigabyte, tmp_path):
    command = [sys.executable, "-m", "qtool", "quantize", str(quarter_gigabyte), "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "out.partial").exists() and process.poll() is None:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert nothing_but(tmp_path)


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Peak RSS of whole processes: eight times the weights may not take a tenth more."""
    peaks = [peak_rss(tmp_path / str(rows), rows) for rows in (100_000, 800_000)]
    assert peaks[1] < 1.1 * peaks[0]


def peak_rss(folder: Path, rows: int) -> int:
    model = write_checkpoint(folder / "model", large(rows))
    script = "import resource, sys; from qtool import quantize, QuantizeOptions; from pathlib import Path;"
    script += "quantize(QuantizeOptions(model=sys.argv[1], output=Path(sys.argv[2])));"
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    run = subprocess.run(
        [sys.executable, "-c", script, model, folder / "out"], capture_output=True, text=True, check=True
    )
    return int(run.stdout)
