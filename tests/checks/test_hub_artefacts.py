"""Artefacts on the hub as verify, score, embed and serve-command open them, from a server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

import qtool
from qtool.artefact import GgufArtefact, artefacts_of, open_artefact
from qtool.cli import app
from qtool.errors import ModelError, NetworkError, UsageError
from qtool.export.quantize import QuantizeOptions, prepare_quantization
from tests.bench.checkpoints import make_headers
from tests.checks.conftest import edit_json
from tests.hub import SHA, as_the_hub

MB = 1_000_000


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """Serve a folder and let huggingface_hub, in this process, take the server for the hub, with an empty cache."""
    with ExitStack() as running:
        cache = tmp_path_factory.mktemp("hub-cache")
        yield lambda folder, **options: running.enter_context(as_the_hub(folder, monkeypatch, cache, **options))


def cached() -> set[str]:
    """Names of the files in huggingface_hub's cache."""
    return {path.name for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_symlink()}


@pytest.fixture
def quants(made, tmp_path):
    """A repository as publishers of GGUF files make them: several types, projectors, a config.json, a README."""
    folder = tmp_path / "quants"
    shutil.copytree(made("reranker-gguf"), folder)
    (folder / "model.gguf").rename(folder / "Demo-F16.gguf")
    shutil.copyfile(folder / "Demo-F16.gguf", folder / "Demo-Q8_0.gguf")
    (folder / "README.md").write_text("words")
    (folder / "config.json").write_text("{}")
    return folder


def test_of_a_gguf_repository_the_chosen_file_and_its_projector_are_fetched(quants, hub):
    hub(quants)
    artefact = open_artefact("hf://org/model@v1/Demo-Q8_0.gguf")
    assert cached() == {"Demo-Q8_0.gguf", "mmproj.gguf", "qtool.json"}
    assert (artefact.path.name, artefact.revision) == ("Demo-Q8_0.gguf", SHA)
    assert artefact.projector.path.name == "mmproj.gguf"


def test_what_there_is_is_listed_where_a_repository_holds_several(quants, hub):
    hub(quants)
    with pytest.raises(UsageError, match=r"2 language models, not one: Demo-F16\.gguf, Demo-Q8_0\.gguf") as caught:
        open_artefact("org/model")
    assert caught.value.hint == "Name the file: hf://org/model/….gguf."
    assert cached() == set()
    assert artefacts_of("hf://org/model@v1") == ["hf://org/model@v1/Demo-F16.gguf", "hf://org/model@v1/Demo-Q8_0.gguf"]


def test_a_repository_of_one_model_needs_no_file_name(made, hub):
    hub(made("text-reranker-gguf"))
    artefact = open_artefact("org/model")
    assert isinstance(artefact, GgufArtefact)
    assert cached() == {"model.gguf", "qtool.json"}


def test_all_parts_of_a_split_model_are_fetched_and_a_lost_one_is_named(made, tmp_path, hub):
    options = {"outtypes": "f16", "mmproj": "none", "split_max_size": 120_000, "progress": None}
    qtool.convert_gguf(made("text-reranker"), output=tmp_path / "split", **options)
    parts = sorted(path.name for path in (tmp_path / "split").glob("*.gguf"))
    hub(tmp_path / "split")
    artefact = open_artefact(f"hf://org/model/{parts[1]}")
    assert [path.name for path in artefact.model.paths] == parts
    (tmp_path / "split" / parts[2]).unlink()
    with pytest.raises(ModelError, match=f"org/model lacks {parts[2]}"):
        open_artefact("org/model")


def test_several_projectors_that_fit_can_be_chosen_from_in_the_repository(quants, hub):
    shutil.copyfile(quants / "mmproj.gguf", quants / "mmproj-BF16.gguf")
    hub(quants)
    with pytest.raises(UsageError, match=r"hf://org/model holds 2 projectors, not one: mmproj-BF16.gguf, mmproj.gguf"):
        open_artefact("hf://org/model/Demo-F16.gguf")
    artefact = open_artefact("hf://org/model/Demo-F16.gguf", mmproj=Path("mmproj-BF16.gguf"))
    assert artefact.projector.path.name == "mmproj-BF16.gguf"
    assert "mmproj.gguf" not in cached()


def test_what_was_fetched_is_found_without_a_network(quants, hub, monkeypatch):
    hub(quants)
    first = open_artefact("hf://org/model/Demo-F16.gguf")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = open_artefact("hf://org/model/Demo-F16.gguf")
    assert (again.path, again.projector.path, again.revision) == (first.path, first.projector.path, SHA)
    with pytest.raises(NetworkError, match="is not in the cache"):
        open_artefact("hf://org/model/Demo-Q8_0.gguf")
    with pytest.raises(NetworkError, match="org/other is not in the cache"):
        open_artefact("org/other")


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("hf://org/model/other.gguf", UsageError, r"has no file other\.gguf"),
        ("hf://org/model/README.md", UsageError, "is not a GGUF file"),
        ("org/other", NetworkError, "is not on the Hub"),
        ("hf://org/model@v9/Demo-F16.gguf", NetworkError, "has no revision v9"),
        ("hf://org/model/a/b", UsageError, "has no file a/b"),
    ],
)
def test_what_is_not_there_is_said(target, error, message, quants, hub):
    hub(quants)
    with pytest.raises(error, match=message):
        open_artefact(target)


def test_a_repository_without_models_is_an_error(tmp_path, hub):
    (tmp_path / "README.md").write_text("words")
    hub(tmp_path)
    with pytest.raises(ModelError, match=r"org/model holds neither config\.json nor GGUF language models"):
        open_artefact("org/model")


@pytest.mark.parametrize(
    "command",
    [
        ["score", "hf://org/model/Demo-Q8_0.gguf", "--panel", "demo-text", "--limit", "1"],
        ["inspect", "hf://org/model/Demo-Q8_0.gguf"],
        ["serve-command", "hf://org/model/Demo-Q8_0.gguf", "--engine", "llama-server"],
        ["verify", "hf://org/model/Demo-Q8_0.gguf", "--reference", "org/base", "--structure-only"],
    ],
)
def test_every_command_takes_a_file_of_a_repository(command, quants, made, hub):
    hub(quants, others={"org/base": made("reranker")})
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception
    assert "Demo-F16.gguf" not in cached()


# Structure only: headers by range.


@pytest.fixture
def large_tokenizers(monkeypatch):
    """The demo tokenizer is small, and a small file is fetched without asking for its hash."""
    monkeypatch.setattr("qtool.storage.hub_folder._LARGE", 1000)


@pytest.mark.usefixtures("large_tokenizers")
def test_structure_only_fetches_no_weights_of_either_side(made, hub):
    server = hub(made("reranker-nvfp4"), others={"org/base": made("reranker")})
    report = qtool.verify("org/model", reference="org/base", structure_only=True, progress=None)
    assert report.stages[0].findings == ()
    assert report.verdict.value == "pass"
    assert (report.artefact.revision, report.reference.revision) == (SHA, SHA)
    assert report.stages[0].findings == ()
    assert cached() == set()
    assert "tokenizer.json" not in server.served  # both sides have the same, by its hash
    weights = sum((made(name) / "model.safetensors").stat().st_size for name in ("reranker", "reranker-nvfp4"))
    assert server.sent_bytes < weights


@pytest.mark.usefixtures("large_tokenizers")
@pytest.mark.parametrize("local", ["artefact", "reference"])
def test_a_side_on_this_disk_is_compared_with_one_on_the_hub(local, made, hub):
    names = {"artefact": "reranker-nvfp4", "reference": "reranker"}
    server = hub(made("reranker-nvfp4"), others={"org/base": made("reranker")})
    targets = {"artefact": "org/model", "reference": "org/base", local: str(made(names[local]))}
    report = qtool.verify(targets["artefact"], reference=targets["reference"], structure_only=True, progress=None)
    assert report.stages[0].findings == ()
    assert "tokenizer.json" not in server.served


@pytest.mark.usefixtures("large_tokenizers")
def test_another_tokenizer_on_the_hub_is_found_by_its_content(made, copy_of, hub):
    folder = copy_of("reranker-nvfp4")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    hub(folder, others={"org/base": made("reranker")})
    report = qtool.verify("org/model", reference="org/base", structure_only=True, progress=None)
    (finding, *_) = report.stages[0].findings
    assert finding.code == "other-tokenizer"


@pytest.mark.usefixtures("large_tokenizers")
def test_a_tokenizer_that_is_declared_otherwise_is_fetched_once_for_both_sides(made, copy_of, hub):
    folder = copy_of("reranker-nvfp4")
    edit_json(folder / "tokenizer_config.json", padding_side="right", model_max_length=77)
    server = hub(folder, others={"org/base": made("reranker")})
    report = qtool.verify("org/model", reference="org/base", structure_only=True, progress=None)
    assert "other-truncation" in {finding.code for finding in report.stages[0].findings}
    assert server.served.count("tokenizer.json") == 1


def test_findings_name_the_repository_and_no_folder_of_headers(copy_of, made, hub):
    folder = copy_of("reranker-nvfp4")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    (folder / "hf_quant_config.json").unlink()
    hub(folder, others={"org/base": made("reranker")})
    report = qtool.verify("org/model", reference="org/base", structure_only=True, progress=None)
    assert {finding.code for finding in report.stages[0].findings} >= {"other-tying", "nvfp4-no-hf-quant-config"}
    assert tempfile.gettempdir() not in report.to_json()


def test_a_remedy_for_a_repository_downloads_into_a_folder(copy_of, made, hub):
    broken = copy_of("reranker-nvfp4")
    edit_json(broken / "preprocessor_config.json", patch_size=14)
    hub(broken)
    report = qtool.verify("org/model", reference=str(made("reranker")), structure_only=True, progress=None)
    found = next(each for each in report.stages[0].findings if each.code == "other-side-file")
    assert found.remedy == "hf download ORG/NAME preprocessor_config.json --local-dir FOLDER"


def test_a_broken_repository_is_named_too(copy_of, made, hub):
    folder = copy_of("reranker-nvfp4")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    hub(folder, others={"org/base": made("reranker")})
    stage = qtool.verify("org/model", reference="org/base", structure_only=True, progress=None).stages[0]
    assert stage.findings[0].code == "unreadable"
    assert "hf://org/model/model.safetensors" in stage.findings[0].sentence


def test_a_2b_shaped_repository_costs_less_than_ten_megabytes(tmp_path, hub):
    reference, artefact = tmp_path / "2B", tmp_path / "nvfp4"
    make_headers(reference, "2B")
    job = prepare_quantization(QuantizeOptions(model=str(reference), output=None, dry_run=True))
    artefact.mkdir()
    for shard in job.layout.shards:
        (artefact / shard.file_name).write_bytes(shard.header)
        os.truncate(artefact / shard.file_name, shard.nbytes)
    for name, data in job.small_files.items():
        (artefact / name).write_bytes(data)
    for path in job.sidecars:
        (artefact / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(reference / path, artefact / path)
    server = hub(artefact, others={"org/base": reference}, hashed_bytes=50 * MB)
    report = qtool.verify("org/model", reference="org/base", structure_only=True, progress=None)
    assert [each.code for each in report.stages[0].findings if each.code.startswith("other")] == []
    assert sum(path.stat().st_size for path in reference.iterdir()) > 4000 * MB
    assert server.sent_bytes < 10 * MB
    assert server.requests < 60
    assert "tokenizer.json" not in server.served  # 6 MB here, 11 MB of the real one; both sides have the same


def test_weights_are_fetched_where_a_stage_needs_them(made, hub):
    hub(made("reranker-nvfp4"), others={"org/base": made("reranker")})
    report = qtool.verify("org/model", reference="org/base", structure_only=True, weights=True, progress=None)
    assert [stage.outcome.value for stage in report.stages[:2]] == ["pass", "pass"]
    assert "model.safetensors" in cached()


# Revisions.


def test_each_side_has_a_revision_of_its_own(made, hub):
    hub(made("reranker-nvfp4"), others={"org/base": made("reranker")})
    options = {"reference": "org/base", "structure_only": True, "progress": None}
    with pytest.raises(NetworkError, match="org/model has no revision v9"):
        qtool.verify("org/model", revision="v9", **options)
    with pytest.raises(NetworkError, match="org/base has no revision v9"):
        qtool.verify("org/model", reference_revision="v9", **options)
    report = qtool.verify("org/model", revision="v1", reference_revision="main", **options)
    assert (report.artefact.revision, report.reference.revision) == (SHA, SHA)


def test_a_revision_of_what_has_none_is_refused(made):
    folder, options = str(made("reranker")), {"structure_only": True, "progress": None}
    with pytest.raises(UsageError, match="--revision names the artefact's revision") as caught:
        qtool.verify(folder, reference="org/base", revision="v1", **options)
    assert "--reference-revision for the reference" in caught.value.hint
    with pytest.raises(UsageError, match="--reference-revision names the reference's revision"):
        qtool.verify(folder, reference=folder, reference_revision="v1", **options)
