"""Models from the hub: the real huggingface_hub against a server on loopback, each run a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qtool.errors import UsageError
from qtool.storage.hub import resolve
from tests.hub import SHA, serve
from tests.tiny import text_config, write_checkpoint


@pytest.fixture
def repository(tmp_path):
    folder = write_checkpoint(tmp_path / "repository", text_config(), shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def run(tmp_path, model, *options, endpoint="http://127.0.0.1:1", **environment):
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **environment}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", "qtool", "quantize", model, "-o", str(tmp_path / "out"), "--force", *options]
    return subprocess.run(command, env={**clean, **settings}, capture_output=True, text=True, check=False)


def source_of(tmp_path):
    return json.loads((tmp_path / "out" / "qtool.json").read_text())["source"]


@pytest.mark.parametrize("model", ["org/model", "hf://org/model", "hf://org/model@v1"])
def test_a_hub_model_is_quantized_and_its_commit_recorded(model, repository, tmp_path):
    with serve(repository) as hub:
        done = run(tmp_path, model, endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert source_of(tmp_path)["origin"] == "hf://org/model"
    assert source_of(tmp_path)["revision"] == SHA
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert "pytorch_model.bin" not in hub.served
    assert (tmp_path / "home" / "hub" / "models--org--model").is_dir()


def test_what_was_fetched_is_used_offline(repository, tmp_path):
    with serve(repository) as hub:
        run(tmp_path, "org/model", endpoint=hub.url)
    done = run(tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert source_of(tmp_path)["revision"] == SHA


def test_another_cache_is_respected(repository, tmp_path):
    with serve(repository) as hub:
        run(tmp_path, "org/model", endpoint=hub.url, HF_HUB_CACHE=str(tmp_path / "cache"))
    assert (tmp_path / "cache" / "models--org--model").is_dir()


def test_a_token_opens_a_gated_model_and_its_absence_is_explained(repository, tmp_path):
    environment = {"HF_TOKEN": "secret"}
    with serve(repository, token="secret") as hub:
        refused = run(tmp_path, "org/model", endpoint=hub.url)
        by_option = run(tmp_path, "org/model", "--token", "secret", endpoint=hub.url)
        by_environment = run(tmp_path, "org/model", endpoint=hub.url, **environment)
    assert refused.returncode == 5
    assert "private or gated" in refused.stderr
    assert by_option.returncode == by_environment.returncode == 0, by_option.stderr


@pytest.mark.parametrize(
    ("model", "options", "environment", "message"),
    [
        ("org/other", (), {}, "org/other is not on the Hub"),
        ("org/model", ("--revision", "v9"), {}, "has no revision v9"),
        ("org/model", (), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_fetched_is_a_network_error(model, options, environment, message, repository, tmp_path):
    with serve(repository) as hub:
        done = run(tmp_path, model, *options, endpoint=hub.url, **environment)
    assert done.returncode == 5, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_is_a_network_error(tmp_path):
    done = run(tmp_path, "org/model")
    assert done.returncode == 5, done.stderr
    assert "cannot be reached" in " ".join(done.stderr.split())


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "./missing", "hf://lonely", "org/m.gguf", "tests/m"])
def test_what_is_neither_folder_nor_repository_is_a_usage_error(model):
    with pytest.raises(UsageError, match="Not a local folder or a Hub repository"):
        resolve(model)


def test_two_revisions_are_one_too_many():
    with pytest.raises(UsageError, match="name different revisions"):
        resolve("hf://org/model@v1", "v2")
