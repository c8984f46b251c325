"""The serving command of each kind of artefact, and what is refused with the reason."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qtool import resources
from qtool.arch.prompts import TEXT_RERANKER, VL_RERANKER, rerank_template
from qtool.arch.spec import Task
from qtool.cli import app
from qtool.errors import ModelError, UsageError
from qtool.serve_command import ServingEngine, parse_engine, serve_command, with_template
from qtool.storage.gguf import string, uint32
from qtool.storage.gguf_model import RERANK_KEY as RERANK_TEMPLATE
from tests.export.models import MODELS
from tests.scoring.gguf_files import changed, gguf_of, projector_of, quantized, text_family_of
from tests.tiny import text_config, write_checkpoint

RERANKER = resources.demo_model("qtool-demo-reranker")
EMBEDDER = resources.demo_model("qtool-demo-embedder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def artefact(folder):
    return quantized(RERANKER, folder)


def options_of(path, engine, port=None, task=None):
    """The words of the command before its first option, and the options with their values."""
    argv = with_template(serve_command(str(path), parse_engine(engine), port, task, None), write=False).argv
    first = next(place for place, word in enumerate(argv) if word.startswith("--"))
    options, name = {}, ""
    for word in argv[first:]:
        name = word if word.startswith("--") else name
        options[name] = None if word == name else word
    return argv[:first], options


def test_vllm_serves_a_quantized_reranker_with_its_template(artefact):
    words, options = options_of(artefact, "vllm", port=8001)
    assert words == ("vllm", "serve", str(artefact))
    assert json.loads(options.pop("--hf-overrides")) == {
        "architectures": ["Qwen3VLForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    assert json.loads(options.pop("--mm-processor-kwargs")) == {"min_pixels": 4096, "max_pixels": 1843200}
    template = str(artefact / "rerank_template.jinja")
    assert options == {
        "--runner": "pooling", "--quantization": "modelopt", "--chat-template": template, "--port": "8001"
    }  # fmt: skip


def test_vllm_serves_an_unquantized_embedder_without(folder):
    assert options_of(EMBEDDER, "vllm")[1].keys() == {"--runner", "--mm-processor-kwargs"}
    text = text_family_of(EMBEDDER, folder)
    assert options_of(text, "vllm", task=Task.EMBED)[1] == {"--runner": "pooling"}


def test_sglang_ranks_without_an_embedding_mode(artefact):
    words, options = options_of(artefact, "sglang")
    assert words == ("python", "-m", "sglang.launch_server")
    assert json.loads(options.pop("--mm-process-config")) == {"image": {"min_pixels": 4096, "max_pixels": 1843200}}
    assert options == {
        "--model-path": str(artefact), "--quantization": "modelopt_fp4", "--disable-radix-cache": None,
        "--chat-template": str(artefact / "rerank_template.jinja"),
    }  # fmt: skip
    assert "--is-embedding" in options_of(EMBEDDER, "sglang")[1]


def test_llama_server_gets_room_for_a_whole_prompt_and_the_official_pixels(folder):
    gguf = gguf_of(RERANKER, "f16", folder)
    assert options_of(gguf, "llama-server")[1] == {
        "--model": str(gguf), "--ctx-size": "10246", "--batch-size": "10246", "--ubatch-size": "10246", "--rerank": None
    }  # fmt: skip
    embedder = gguf_of(EMBEDDER, "f16", folder)
    command = serve_command(str(embedder), ServingEngine.LLAMA_SERVER, None, None, None)
    assert command.notes == ("There is no fitting projector beside model.gguf, so this serves texts only.",)
    projector = shutil.copy(projector_of(EMBEDDER, folder), embedder.parent)
    assert options_of(embedder, "llama-server")[1] == {
        "--model": str(embedder), "--ctx-size": "8193", "--embedding": None, "--pooling": "last",
        "--mmproj": str(projector), "--image-min-tokens": "4", "--image-max-tokens": "1800",
    }  # fmt: skip


def test_no_command_names_a_projector_that_does_not_fit(folder, tmp_path):
    embedder = Path(shutil.copy(gguf_of(EMBEDDER, "f16", folder), tmp_path))
    projector = projector_of(EMBEDDER, folder)
    other = changed(projector, tmp_path / "mmproj-other.gguf", {"clip.vision.projection_dim": uint32(999)})
    assert "--mmproj" not in options_of(embedder, "llama-server")[1]
    with pytest.raises(ModelError, match="gives vectors of 999"):
        serve_command(str(embedder), ServingEngine.LLAMA_SERVER, None, None, None, other)
    own = shutil.copy(projector, tmp_path / "mmproj-own.gguf")
    assert options_of(embedder, "llama-server")[1]["--mmproj"] == str(own)


def test_of_several_projectors_one_is_chosen_by_option(folder, tmp_path):
    embedder = Path(shutil.copy(gguf_of(EMBEDDER, "f16", folder), tmp_path))
    one, two = (shutil.copy(projector_of(EMBEDDER, folder), tmp_path / f"mmproj-{name}.gguf") for name in "ab")
    call = ["serve-command", str(embedder), "--engine", "llama-server"]
    refused = CliRunner().invoke(app, call).exception
    assert isinstance(refused, UsageError)
    assert "--mmproj" in refused.hint
    for chosen in (one, two):
        assert f"--mmproj {chosen}" in CliRunner().invoke(app, [*call, "--mmproj", str(chosen)]).stdout
    for path, engine in ((gguf_of(RERANKER, "f16", folder), "llama-server"), (EMBEDDER, "vllm")):
        with pytest.raises(UsageError, match="takes no projector"):
            serve_command(str(path), parse_engine(engine), None, None, None, Path(one))


def test_a_file_that_would_rank_wrongly_gets_no_command(folder, tmp_path):
    broken = changed(gguf_of(RERANKER, "f16", folder), tmp_path / "broken.gguf", {}, ["cls.output.weight"])
    with pytest.raises(ModelError, match="cannot rank"):
        serve_command(str(broken), ServingEngine.LLAMA_SERVER, None, None, None)


@pytest.mark.parametrize("demo", [RERANKER, EMBEDDER])
def test_what_llama_cpp_misreads_gets_no_command(demo, tmp_path):
    """inspect: nvfp4-scales-ignored; the text family's scales are applied."""
    vision = gguf_of(quantized(demo, tmp_path), "nvfp4", tmp_path)
    with pytest.raises(ModelError, match="ignores the feed-forward scales of qwen3vl") as refused:
        serve_command(str(vision), ServingEngine.LLAMA_SERVER, None, None, None)
    assert "qtool convert-gguf MODEL -o OUT --outtype q8_0" in refused.value.hint


def test_the_text_familys_nvfp4_is_served(tmp_path):
    model = MODELS["text-reranker-untied"](tmp_path / "model")
    text = gguf_of(quantized(model, tmp_path), "nvfp4", tmp_path)
    assert "--rerank" in options_of(text, "llama-server")[1]


def test_a_prompt_of_the_other_family_gets_no_command_and_an_unknown_one_a_note(folder, tmp_path):
    right = gguf_of(RERANKER, "f16", folder)
    text = TEXT_RERANKER.template.replace("{instruction}", "Match colours.")
    wrong = changed(right, tmp_path / "wrong.gguf", {RERANK_TEMPLATE: string(text)})
    with pytest.raises(ModelError, match="prompt of the text family baked in") as refused:
        serve_command(str(wrong), ServingEngine.LLAMA_SERVER, None, None, None)
    assert f"qtool repair-gguf {wrong} -o FIXED.gguf --task rerank" in refused.value.hint
    own = changed(right, tmp_path / "own.gguf", {RERANK_TEMPLATE: string("{query} {document}")})
    notes = serve_command(str(own), ServingEngine.LLAMA_SERVER, None, None, None).notes
    assert f"qtool repair-gguf {own} -o FIXED.gguf --task rerank" in notes[-1]


def test_engines_that_cannot_serve_an_artefact_say_why(folder, artefact, tmp_path):
    headed = write_checkpoint(
        tmp_path / "headed", text_config(architecture="Qwen3ForSequenceClassification", num_labels=1)
    )
    for path, engine, message in (
        (gguf_of(RERANKER, "f16", folder), ServingEngine.VLLM, "is a GGUF file, which vllm does not serve"),
        (artefact, ServingEngine.LLAMA_SERVER, "llama-server needs a GGUF file"),
        (headed, ServingEngine.SGLANG, "gives such models no prompt"),
    ):
        with pytest.raises(UsageError, match=message):
            serve_command(str(path), engine, None, None, None)
    with pytest.raises(ModelError, match=r"holds neither config\.json nor GGUF"):
        serve_command(str(tmp_path), ServingEngine.VLLM, None, None, None)
    with pytest.raises(UsageError, match="Unknown engine 'ollama'"):
        parse_engine("ollama")
    with pytest.raises(UsageError, match="does not say whether it is a reranker"):
        serve_command(str(write_checkpoint(tmp_path / "bare", text_config())), ServingEngine.VLLM, None, None, None)


def test_the_command_line_prints_the_command_alone(tmp_path):
    runner = CliRunner()
    missing = runner.invoke(app, ["serve-command", str(RERANKER), "--engine", "vllm"])
    assert isinstance(missing.exception, UsageError)
    assert "rerank_template.jinja is missing; without it" in missing.exception.message
    template = tmp_path / "with space.jinja"
    call = ["serve-command", str(RERANKER), "--engine", "sglang", "--write-template", str(template)]
    shown = runner.invoke(app, call)
    assert shown.exit_code == 0
    assert shown.stdout.count("\n") == 1
    assert shlex.split(shown.stdout)[-1] == str(template)
    assert "50 likeliest" in shown.stderr
    assert template.read_text() == rerank_template(VL_RERANKER)
    template.write_text("another")
    report = json.loads(runner.invoke(app, [*call, "--json"]).stdout)
    assert report["argv"] == shlex.split(report["command"])
    assert any("is not the template of the official prompt" in note for note in report["notes"])
    assert template.read_text() == "another"
