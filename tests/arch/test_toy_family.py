"""A family that is declared as docs/adding-a-model.md says goes through every command, and through nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from qtool.arch.families import FAMILIES
from qtool.artefact import open_artefact
from qtool.checks.inspect import inspect
from qtool.checks.prompts import compare_prompts
from qtool.checks.rederive import rederive
from qtool.checks.reference import reference_in
from qtool.checks.stage import Outcome
from qtool.checks.structure import check_structure
from qtool.checks.weights import compare_weights
from qtool.errors import ModelError
from qtool.export.convert import convert_gguf
from qtool.export.gguf_plan import ConvertOptions
from qtool.export.quantize import QuantizeOptions, quantize
from qtool.export.repair import RepairOptions, repair_gguf
from qtool.inputs.items import Item, Pair
from qtool.scoring.llama_cpp.model import read_model
from qtool.scoring.runtime import open_runtime
from qtool.serve_command import ServingEngine, serve_command
from qtool.storage.gguf import read_gguf
from qtool.storage.gguf_model import RERANK_KEY
from tests.export.models import RERANKER, SIZES, random_model
from tests.tiny import text_config

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


@pytest.fixture(scope="module")
def family():
    """The family that the page declares, registered while the tests of this module run."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names = {}
    exec(code, names)  # noqa: S102 - our own page
    FAMILIES["toy"] = names["TOY"]
    yield names["TOY"]
    del FAMILIES["toy"]


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    """A small random checkpoint of it."""
    (architecture,) = family.architectures
    config = text_config(SIZES, architecture=architecture.name)
    folder = random_model(config, like=RERANKER)(tmp_path_factory.mktemp("toy") / "model")
    (folder / "config_sentence_transformers.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def quantized(model):
    output = model.with_name("nvfp4")
    quantize(QuantizeOptions(model=str(model), output=output))
    return output


@pytest.fixture(scope="module")
def gguf(model):
    output = model.with_name("model.gguf")
    convert_gguf(ConvertOptions(model=str(model), output=output, outtypes=("f16",)))
    return output


def test_without_the_registration_nothing_knows_it(model, monkeypatch):
    monkeypatch.delitem(FAMILIES, "toy")
    with pytest.raises(ModelError, match="Unknown architecture 'ToyForCausalLM'"):
        quantize(QuantizeOptions(model=str(model), output=model.with_name("none"), dry_run=True))


def test_the_plans_claim_every_tensor(model):
    summary = quantize(QuantizeOptions(model=str(model), output=model.with_name("none"), dry_run=True))
    assert summary.architecture == "ToyForCausalLM"
    summary = convert_gguf(ConvertOptions(model=str(model), output=model.with_name("none"), dry_run=True))
    assert [file.role for file in summary.files] == ["model"]
    assert summary.rank_template == FAMILIES["toy"].reranker.template.replace(
        "{instruction}", "Decide whether the document answers the query."
    )


def test_inspection_knows_the_family_and_finds_nothing_wrong(model, quantized, gguf):
    for path in (model, quantized, gguf):
        (artefact,) = inspect(str(path)).artefacts
        assert (artefact.family, artefact.task, artefact.findings) == ("Toy", "rerank", ())
    assert artefact.markers["rerank template"] == "official"


def test_a_gguf_file_bears_its_names_and_is_read_back(gguf, family, tmp_path):
    header = read_gguf(gguf)
    assert header.get("general.architecture") == "toy"
    assert header.get("toy.block_count") == SIZES["num_hidden_layers"]
    scored = read_model(gguf)
    assert (scored.family, scored.prompt, scored.baked_instruction) == (
        family,
        family.reranker,
        family.reranker.default_instruction,
    )
    convert_gguf(ConvertOptions(model=str(gguf.parent / "model"), output=tmp_path / "m.gguf", prompt="llamacpp"))
    repair_gguf(RepairOptions(broken=tmp_path / "m.gguf", output=tmp_path / "fixed.gguf"))
    assert read_gguf(tmp_path / "fixed.gguf").get(RERANK_KEY) == header.get(RERANK_KEY)


def test_artefacts_are_verified_against_it(model, quantized, gguf, tmp_path):
    for path in (quantized, gguf):
        artefact, reference = open_artefact(str(path)), reference_in(model)
        for stage in (
            check_structure(artefact, reference),
            compare_weights(artefact, reference)[0],
            rederive(artefact, reference, tmp_path)[0],
        ):
            assert (stage.outcome, stage.findings) == (Outcome.PASS, ())


def test_its_own_prompt_is_scored_and_served(model, quantized, family):
    pair = Pair(Item("q", ("a ball",)), Item("d", ("a red ball",)))
    text = family.reranker.template.format(
        instruction=family.reranker.default_instruction, query="a ball", document="a red ball"
    )
    reference, artefact = open_runtime(str(model)), open_runtime(str(quantized))
    assert reference.family == "toy"
    assert reference.prompt_seen(pair).token_ids == tuple(
        Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    )
    stage = compare_prompts(reference, artefact, [pair], reference_in(model), "ARTEFACT")
    assert (stage.outcome, stage.findings) == (Outcome.PASS, ())
    assert abs(reference.score([pair])[0] - artefact.score([pair])[0]) < 1
    command = serve_command(str(quantized), ServingEngine.VLLM, None, None, None)
    overrides = json.loads(command.argv[command.argv.index("--hf-overrides") + 1])
    assert overrides["architectures"] == ["ToyForSequenceClassification"]
    assert (quantized / "rerank_template.jinja").read_text() == command.template[1]
    assert "Decide whether the document answers the query." in command.template[1]
