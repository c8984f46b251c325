"""Artefacts on the hub: read by ranges from a server on loopback, header only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from gguf.constants import GGUFValueType
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from qtool.checks.inspect import inspect
from qtool.errors import ModelError, NetworkError, UsageError
from qtool.formats.ggml import F32
from qtool.storage.gguf import array, read_gguf, string
from qtool.storage.gguf_layout import GgufOutputTensor, lay_out
from tests.checks.rewriting import codes, rewrite_gguf, rewrite_safetensors
from tests.checks.test_checkpoint import QUERY, scale_of
from tests.hub import SHA, as_the_hub, serve

CODES = {"nvfp4-scales-unread"}
MB = 1 << 20


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """Serve a folder and let huggingface_hub, in this process, take the server for the hub."""
    with ExitStack() as running:
        cache = tmp_path_factory.mktemp("hub-cache")
        yield lambda folder, **options: running.enter_context(as_the_hub(folder, monkeypatch, cache, **options))


def without_places(report):
    """The artefacts as JSON without what names their place."""
    artefacts = [artefact.to_dict() for artefact in report.artefacts]
    for artefact in artefacts:
        artefact["name"] = artefact["name"].rpartition("/")[2]
        artefact["markers"].pop("pre-tokenizer", None)  # tokenizer.json is not fetched
        for finding in artefact["findings"]:
            finding["remedy"] = ""
    return artefacts


@pytest.mark.parametrize("name", ["reranker-gguf", "text-reranker-nvfp4-gguf", "embedder"])
@pytest.mark.parametrize("target", ["org/model", "hf://org/model", "hf://org/model@v1"])
def test_a_repository_is_seen_as_the_folder_that_it_is(name, target, made, hub):
    hub(made(name))
    report = inspect(target)
    assert codes(report) == []
    assert report.revision == SHA
    remote, local = without_places(report), without_places(inspect(str(made(name))))
    if name == "embedder":
        remote[0]["name"] = local[0]["name"]
    assert remote == local


def test_one_file_of_a_repository_is_matched_with_its_projector(made, hub):
    hub(made("reranker-gguf"))
    report = inspect("hf://org/model@v1/model.gguf")
    assert [artefact.markers["projector"] for artefact in report.artefacts] == ["mmproj.gguf"]


def big_gguf(folder, like):
    """A file of 3 GB with a vocabulary of 150,000, all holes but for the header."""
    header = read_gguf(like)
    tokens = [f"token number {number}" for number in range(150_000)]
    metadata = {**header.metadata, "tokenizer.ggml.tokens": array(GGUFValueType.STRING, tokens)}
    outputs = [GgufOutputTensor(name, t.type, t.shape, t.nbytes) for name, t in header.tensors.items()]
    outputs.append(GgufOutputTensor("big.weight", F32, (30_000, 25_000), 3_000_000_000))
    (layout,) = lay_out("big.gguf", metadata, outputs)
    path = folder / "big.gguf"
    path.write_bytes(layout.header)
    os.truncate(path, layout.nbytes)
    return len(layout.header)


@pytest.mark.parametrize("has_store", [False, True])
def test_a_big_file_costs_its_header(has_store, made, tmp_path, hub):
    header_bytes = big_gguf(tmp_path, made("text-reranker-gguf") / "model.gguf")
    server = hub(tmp_path, has_store=has_store)
    report = inspect("hf://org/model/big.gguf")
    assert report.artefacts[0].nbytes > 3_000_000_000
    assert header_bytes > 3 * MB
    assert report.fetched_bytes <= header_bytes + 2 * MB
    assert server.sent_bytes <= report.fetched_bytes + 10_000
    assert server.requests <= 5 + has_store  # information, parts of 2 MB, and once the way to the store


def test_the_store_of_large_files_never_sees_the_token(made, hub):
    hub(made("text-reranker-gguf"), token="secret", has_store=True)
    assert codes(inspect("org/model", token="secret")) == []


def test_a_token_opens_a_gated_repository(made, hub, monkeypatch):
    hub(made("text-reranker-gguf"), token="secret")
    with pytest.raises(NetworkError, match="private or gated"):
        inspect("org/model")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert codes(inspect("org/model")) == []


def padded_checkpoint(folder, gap):
    """Add tensors of `gap` bytes between the global scales, by order of name and type."""

    def change(tensors):
        names = [name for name in tensors if name.endswith(".weight_scale_2")]
        for name in names:
            tensors[f"{name}x"] = torch.zeros(gap // 4)

    rewrite_safetensors(folder, change)


def test_the_global_scales_of_a_checkpoint_are_read_alone(copy_of, hub):
    folder = copy_of("reranker-nvfp4")
    scale_of(QUERY, torch.tensor(0.5))(folder)
    server = hub(folder)
    report = inspect("org/model")
    assert codes(report) == ["nvfp4-unequal-scales"]
    assert "tokenizer.json" not in server.served
    assert report.fetched_bytes < 300_000


def test_scales_that_lie_far_apart_are_left_unread(copy_of, hub):
    folder = copy_of("reranker-nvfp4")
    padded_checkpoint(folder, MB)
    hub(folder)
    assert codes(inspect("org/model")) == ["safetensors-unknown-tensor", "nvfp4-scales-unread"]


def test_a_checkpoint_in_shards_is_read_by_its_index(copy_of, hub):
    folder = copy_of("embedder")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (index > 40)}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    hub(folder)
    assert codes(inspect("org/model")) == []
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        inspect("org/model")


def test_a_corrupt_remote_header_is_an_error(copy_of, hub):
    folder = copy_of("embedder")
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)
    hub(folder)
    with pytest.raises(ModelError, match="its header would end"):
        inspect("org/model")


def test_passing_failures_are_tried_again(made, hub):
    server = hub(made("text-reranker-gguf"), failures=2)
    assert codes(inspect("org/model")) == []
    assert server.failures == 0


def test_lasting_failures_are_network_errors(made, hub):
    hub(made("text-reranker-gguf"), failures=100)
    with pytest.raises(NetworkError, match="Cannot download org/model"):
        inspect("org/model")


def test_a_server_that_sends_whole_files_is_refused(made, hub):
    server = hub(made("reranker-gguf"), knows_ranges=False)
    with pytest.raises(NetworkError, match="does not support range requests"):
        inspect("org/model")
    assert server.served == ["mmproj.gguf"]


def test_offline_means_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE is set"):
        inspect("org/model")


def test_an_unreachable_hub_is_a_network_error(hub, tmp_path, monkeypatch):
    hub(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(NetworkError, match="Cannot read org/model"):
        inspect("org/model")


def test_what_is_not_there_is_said(made, hub):
    hub(made("text-reranker-gguf"))
    with pytest.raises(NetworkError, match="has no revision v9"):
        inspect("org/model", revision="v9")
    with pytest.raises(NetworkError, match="org/other is not on the Hub"):
        inspect("org/other")
    with pytest.raises(UsageError, match=r"has no file other\.gguf"):
        inspect("hf://org/model/other.gguf")
    with pytest.raises(UsageError, match="names the revision v1; --revision asks for v2"):
        inspect("hf://org/model@v1", revision="v2")


def test_a_repository_without_models_is_an_error(tmp_path, hub):
    (tmp_path / "README.md").write_text("words")
    hub(tmp_path)
    with pytest.raises(ModelError, match="holds neither GGUF nor safetensors"):
        inspect("org/model")


def test_the_environment_of_the_hub_is_honoured(made, tmp_path):
    program = "from qtool.checks.inspect import inspect; print(inspect('org/model').revision)"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with serve(made("text-reranker-gguf"), token="secret") as server:
        settings = {"HF_ENDPOINT": server.url, "HF_TOKEN": "secret", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", program], env={**clean, **settings}, capture_output=True, text=True, check=True
        )
    assert done.stdout.strip() == SHA


def test_a_broken_remote_file_is_reported_with_a_command_for_a_local_one(copy_of, hub):
    folder = copy_of("text-reranker-gguf")
    rewrite_gguf(folder / "model.gguf", lambda values: values.update({"tokenizer.chat_template.rerank": string("")}))
    hub(folder)
    (finding,) = inspect("hf://org/model/model.gguf").findings
    assert finding.remedy == "qtool repair-gguf FILE -o FIXED.gguf --task rerank"
