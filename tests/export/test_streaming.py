"""Weights that are read from the hub by range: the same bytes as from disk, whatever the link does to them on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import qtool
from qtool.errors import ModelError, NetworkError, UsageError
from tests.checks.good import write_reference
from tests.hub import SHA, as_the_hub, serve
from tests.tiny import text_config, write_checkpoint

FAULTS = {
    "connections that are cut": {"cuts": 9},
    "answers that are shorter than promised": {"shorts": 9},
    "a server that restarts": {"failures": 3},
    "a server that asks for patience": {"busy": 3, "retry_after": "0.01"},
    "signed addresses that expire": {"has_store": True, "store_uses": 2},
    "no hashes": {"tells": "nothing"},
    "sizes without hashes": {"tells": "sizes"},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks, and few of them at a time, also in a model of some hundred kilobytes."""
    monkeypatch.setattr("qtool.storage.hub_weights.BLOCK", 3000)
    monkeypatch.setattr("qtool.storage.hub_weights.WINDOW", 4)
    monkeypatch.setattr("qtool.storage.hub_repository._PIECE", 1000)
    monkeypatch.setattr("qtool.storage.hub_folder._CHUNK", 10_000)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """Serve a folder and let huggingface_hub, in this process, take the server for the hub, with an empty cache."""
    with ExitStack() as running:
        cache = tmp_path_factory.mktemp("hub-cache")
        yield lambda folder, **options: running.enter_context(as_the_hub(folder, monkeypatch, cache, **options))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A VL reranker in three weight files with the demo's tokenizer."""
    return write_reference(tmp_path_factory.mktemp("models") / "reranker", "vl", shards=3)


@pytest.fixture(scope="module")
def from_disk(model, tmp_path_factory):
    """The artefact that quantizing it from disk gives."""
    output = tmp_path_factory.mktemp("made") / "disk"
    qtool.quantize(model, output=output, progress=None)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which names the origin."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "qtool.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def cached_weights() -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


def hashes(folder: Path) -> object:
    return json.loads((folder / "qtool.json").read_text())["files"]


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_quantizing_from_the_hub_gives_the_bytes_of_quantizing_from_disk(fault, model, from_disk, tmp_path, hub):
    hub(model, **FAULTS.get(fault, {}))
    summary = qtool.quantize("org/model", output=tmp_path / "hub", stream=True, progress=None)
    assert summary.streamed
    assert contents(tmp_path / "hub") == contents(from_disk)
    assert hashes(tmp_path / "hub") == hashes(from_disk)
    assert json.loads((tmp_path / "hub" / "qtool.json").read_text())["source"]["revision"] == SHA
    assert cached_weights() == []


@pytest.mark.parametrize("fault", ["none", "connections that are cut"])
def test_converting_from_the_hub_gives_the_same_files_and_reads_each_weight_once(
    fault, model, tmp_path, hub, monkeypatch
):
    server = hub(model)
    options = {"outtypes": ["f16", "q8_0", "bf16"], "progress": None}
    qtool.convert_gguf("org/model", output=tmp_path / "cached", stream=False, **options)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    vars(server).update(FAULTS.get(fault, {}))
    before = server.sent_bytes
    qtool.convert_gguf("org/model", output=tmp_path / "streamed", stream=True, **options)
    assert len(list((tmp_path / "streamed").glob("*.gguf"))) == 4
    assert contents(tmp_path / "streamed") == contents(tmp_path / "cached")
    assert hashes(tmp_path / "streamed") == hashes(tmp_path / "cached")
    assert server.sent_bytes - before < 1.5 * sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    assert cached_weights() == []


def test_a_head_far_from_its_rows_neighbours_is_read_in_order(tmp_path, hub):
    folder = write_checkpoint(tmp_path / "untied", text_config(), shards=4)
    server = hub(folder)
    qtool.quantize("org/model", output=tmp_path / "out", task="embed", stream=True, progress=None)
    qtool.quantize(folder, output=tmp_path / "disk", task="embed", progress=None)
    assert contents(tmp_path / "out") == contents(tmp_path / "disk")
    assert server.requests < 400


def test_bytes_that_do_not_have_the_hash_that_the_hub_tells_are_refused(model, tmp_path, hub):
    weights = sorted(path.name for path in model.glob("*.safetensors"))
    hub(model, flipped=weights[1])
    with pytest.raises(ModelError, match=f"{weights[1]} of org/model arrived with other bytes"):
        qtool.quantize("org/model", output=tmp_path / "out", stream=True, progress=None)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_side_file_that_does_not_have_its_hash_is_refused(model, tmp_path, hub):
    hub(model, flipped="tokenizer.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json of org/model arrived with other bytes"):
        qtool.quantize("org/model", output=tmp_path / "out", stream=True, progress=None)


def test_another_commit_midway_is_an_error(model, tmp_path, hub):
    hub(model, moved_after=30)
    with pytest.raises(NetworkError, match="changed while it was read"):
        qtool.quantize("org/model", output=tmp_path / "out", stream=True, progress=None)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_stays_away_is_a_network_error(model, tmp_path, hub):
    hub(model, cuts=10_000)
    with pytest.raises(NetworkError, match="Cannot read org/model"):
        qtool.quantize("org/model", output=tmp_path / "out", stream=True, progress=None)
    assert not (tmp_path / "out").exists()


def test_a_server_that_asks_for_more_patience_than_there_is_ends_the_run(model, tmp_path, hub):
    hub(model, busy=1000, retry_after="86400")
    with pytest.raises(NetworkError, match="429"):
        qtool.quantize("org/model", output=tmp_path / "out", stream=True, progress=None)


def test_nan_in_the_middle_of_a_streamed_model_is_reported_as_from_disk(tmp_path, hub):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan

    folder = write_checkpoint(tmp_path / "model", text_config(), change=change, shards=2)
    hub(folder)
    with pytest.raises(ModelError, match=r"up_proj\.weight holds 1 NaN or infinite weights"):
        qtool.quantize("org/model", output=tmp_path / "out", task="embed", stream=True, progress=None)


def test_the_store_never_sees_the_token_and_no_output_holds_it(model, tmp_path, hub):
    server = hub(model, token="hf_canary", has_store=True)
    qtool.quantize("org/model", output=tmp_path / "out", stream=True, token="hf_canary", progress=None)
    assert server.tokens_in_store == []
    assert not any(b"hf_canary" in data for data in contents(tmp_path).values())
    assert b"hf_canary" not in (tmp_path / "out" / "qtool.json").read_bytes()


def test_a_disk_that_is_too_short_makes_it_stream(model, tmp_path, hub, monkeypatch):
    hub(model)
    short = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("qtool.storage.hub.disk_usage", lambda _: short)
    monkeypatch.setattr("qtool.export.quantize.require_space", lambda *_: None)
    assert qtool.quantize("org/model", output=tmp_path / "out", progress=None).streamed
    assert cached_weights() == []
    assert not qtool.quantize("org/model", output=tmp_path / "out", stream=False, force=True, progress=None).streamed
    assert len(cached_weights()) == 3
    assert not qtool.quantize("org/model", output=tmp_path / "out", force=True, progress=None).streamed  # cached now


def test_a_dry_run_fetches_no_weights(model, hub, monkeypatch):
    monkeypatch.setattr("qtool.storage.hub_folder._CHUNK", 10_000)
    server = hub(model)
    plan = qtool.quantize("org/model", dry_run=True, progress=None)
    files = qtool.convert_gguf("org/model", dry_run=True, progress=None)
    assert (plan.streamed, files.streamed) == (False, False)
    assert plan.output_bytes == qtool.quantize(model, dry_run=True, progress=None).output_bytes
    assert cached_weights() == []
    assert server.sent_bytes < sum(path.stat().st_size for path in model.glob("*.safetensors"))


def test_streaming_needs_a_repository_a_network_and_the_streaming_backend(model, hub, monkeypatch):
    with pytest.raises(UsageError, match="--stream applies to Hub repositories only"):
        qtool.quantize(model, stream=True, progress=None)
    hub(model)
    monkeypatch.setattr("qtool.export.quantize.require_extra", lambda *_: None)
    with pytest.raises(UsageError, match="--stream applies to --backend streaming only"):
        qtool.quantize("org/model", stream=True, backend="modelopt", progress=None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
        qtool.quantize("org/model", stream=True, progress=None)


def test_the_command_line_streams_and_says_so(model, tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "qtool", "quantize", "hf://org/model@v1", "-o", str(tmp_path / "out"), "--stream"]
    with serve(model) as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env={**clean, **settings}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "weights read from the Hub by range, not stored" in done.stdout
    assert not list((tmp_path / "home").rglob("*.safetensors"))
