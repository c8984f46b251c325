"""One door to every runtime: what a user names is opened, and opening reads no weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from qtool import resources
from qtool.arch.spec import Task
from qtool.errors import ModelError, QtoolError, UsageError
from qtool.inputs.builtin import find_panel
from qtool.inputs.panels import load_panel
from qtool.scoring.llama_cpp.runtime import LlamaCppScorer
from qtool.scoring.llama_cpp.server import LlamaCppOptions, Pooling, start_server
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.transformers.runtime import TransformersScorer
from qtool.storage.gguf import Value, uint32
from tests.scoring.gguf_files import changed, gguf_of, projector_of, quantized

RERANKER, EMBEDDER = "qtool-demo-reranker", "qtool-demo-embedder"
TEXT, IMAGE = (load_panel(find_panel(f"demo-{name}")).first(1).pairs[:3] for name in ("text", "image"))


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with its projector, as a hub repository lays them side by side."""
    pytest.importorskip("xllamacpp")
    made, folder = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("gguf")
    model = resources.demo_model(RERANKER)
    shutil.copy(gguf_of(model, "f32", made), folder / "reranker-F32.gguf")
    shutil.copy(projector_of(model, made), folder / "mmproj-reranker-F32.gguf")
    return folder


@pytest.mark.parametrize(("name", "task"), [(RERANKER, Task.RERANK), (EMBEDDER, Task.EMBED)])
def test_a_built_in_model_is_known_before_its_weights_are_read(
    name: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qtool.scoring.transformers.runtime.load", lambda *_: pytest.fail("weights were loaded"))
    scorer = open_runtime(name)
    assert (scorer.task, scorer.family) == (task, "qwen3_vl")
    assert scorer.identity.is_pinned
    assert scorer.identity.numbers.startswith("float32 on")


def test_a_checkpoint_folder_its_copy_and_the_built_in_name_are_one_model(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(resources.demo_model(RERANKER), tmp_path / "copy"))
    (copy / "README.md").write_text("another")
    assert open_runtime(str(copy)).identity == open_runtime(RERANKER).identity
    assert open_runtime(str(copy), RuntimeOptions(dtype="bfloat16")).identity != open_runtime(RERANKER).identity


def test_an_artefact_is_dequantized(tmp_path: Path) -> None:
    exact = open_runtime(RERANKER, RuntimeOptions(device="cpu"))
    artefact = open_runtime(str(quantized(resources.demo_model(RERANKER), tmp_path)), RuntimeOptions(device="cpu"))
    assert isinstance(artefact, TransformersScorer)
    assert artefact.identity.model != exact.identity.model
    difference = np.abs(np.array(artefact.score(TEXT)) - np.array(exact.score(TEXT)))
    assert 0 < difference.max() < 0.3  # measured: 0.11


def test_a_closed_scorer_loads_again() -> None:
    scorer = open_runtime(RERANKER)
    first = scorer.score(TEXT)
    scorer.close()
    assert scorer.score(TEXT) == first


def test_a_gguf_folder_and_its_file_find_the_projector(gguf_folder: Path) -> None:
    by_folder = open_runtime(str(gguf_folder))
    by_file = open_runtime(str(gguf_folder / "reranker-F32.gguf"))
    assert isinstance(by_folder, LlamaCppScorer)
    assert (by_folder.task, by_folder.family) == (Task.RERANK, "qwen3_vl")
    assert by_folder.identity == by_file.identity
    reference = open_runtime(RERANKER, RuntimeOptions(device="cpu")).score(IMAGE)
    with by_folder:
        # Measured: 3.2e-4; docs/gguf.md says where it comes from.
        np.testing.assert_allclose(by_folder.score(IMAGE), reference, rtol=0, atol=1e-3)


def test_two_language_models_or_projectors_must_be_chosen_from(gguf_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gguf_folder, tmp_path / "both"))
    shutil.copy(folder / "reranker-F32.gguf", folder / "second.gguf")
    with pytest.raises(UsageError, match=r"2 language models, not one: reranker-F32\.gguf, second\.gguf"):
        open_runtime(str(folder))
    other = shutil.copy(folder / "mmproj-reranker-F32.gguf", folder / "mmproj-other.gguf")
    with pytest.raises(UsageError, match="2 projectors") as caught:
        open_runtime(str(folder / "second.gguf"))
    assert "--mmproj" in caught.value.hint
    chosen = RuntimeOptions(mmproj=other)
    expected = open_runtime(str(gguf_folder)).identity
    assert open_runtime(str(folder / "second.gguf"), chosen).identity == expected
    other.rename(folder / "mmproj-second.gguf")
    assert open_runtime(str(folder / "second.gguf")).identity == expected  # of two, the one that bears its name


def test_a_projector_of_another_model_is_passed_over_unless_it_is_named(gguf_folder: Path, tmp_path: Path) -> None:
    gguf = shutil.copy(gguf_folder / "reranker-F32.gguf", tmp_path)
    changes: dict[str, Value | None] = {"clip.vision.projection_dim": uint32(999)}
    other = changed(gguf_folder / "mmproj-reranker-F32.gguf", tmp_path / "mmproj-other.gguf", changes)
    (tmp_path / "mmproj-broken.gguf").write_bytes(b"GGUF")
    with open_runtime(str(gguf)) as scorer:
        assert len(scorer.score(TEXT)) == len(TEXT)
        with pytest.raises(UsageError, match="the model's projector is missing"):
            scorer.score(IMAGE)
    with pytest.raises(ModelError, match="gives vectors of 999"):
        open_runtime(str(gguf), RuntimeOptions(mmproj=other))


def test_what_does_not_concern_a_runtime_is_refused(gguf_folder: Path) -> None:
    with pytest.raises(UsageError, match="--dtype applies to checkpoints only"):
        open_runtime(str(gguf_folder), RuntimeOptions(dtype="bfloat16"))
    with pytest.raises(UsageError, match="--task cannot change"):
        open_runtime(str(gguf_folder), RuntimeOptions(task=Task.EMBED))
    with pytest.raises(UsageError, match="is a checkpoint and takes no projector"):
        open_runtime(RERANKER, RuntimeOptions(mmproj=gguf_folder / "mmproj-reranker-F32.gguf"))


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("nowhere.gguf", UsageError, "There is no file"),
        ("nothing", UsageError, "Not a local file, a local folder or a Hub repository"),
        ("empty", ModelError, "config.json"),
    ],
)
def test_a_name_that_means_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, kind: type[QtoolError], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        open_runtime(target)


def test_a_servers_address_opens_a_server(gguf_folder: Path) -> None:
    server = start_server(gguf_folder / "reranker-F32.gguf", None, Pooling.RANK, 1024, LlamaCppOptions(threads=1))
    with pytest.raises(UsageError, match="Unknown engine 'sglang'"):
        open_runtime(server.listening_address, RuntimeOptions(engine="sglang"))
    scorer = open_runtime(server.listening_address, RuntimeOptions(family="qwen3_vl"))
    assert (scorer.task, scorer.family, scorer.identity.is_pinned) == (Task.RERANK, "qwen3_vl", False)
    assert scorer.identity.engine.startswith("llama-server")
    reference = open_runtime(RERANKER, RuntimeOptions(device="cpu")).score(TEXT)
    # Measured: 2.2e-4, what M-RoPE costs in llama.cpp; see tests/scoring/test_llama_cpp.py.
    np.testing.assert_allclose(scorer.score(TEXT), reference, rtol=0, atol=1e-3)
    scorer.close()
