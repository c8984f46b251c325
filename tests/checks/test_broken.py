"""Every broken artefact is found by the cheapest step that can, with the right diagnosis."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import replace

import pytest

from qtool.arch.spec import Task
from qtool.checks.findings import COMPARISON_CODES, Severity
from qtool.checks.findings import INSPECTION_CODES as INSPECTED
from qtool.checks.score_codes import SCORE_CODES
from qtool.checks.stage import Outcome
from qtool.formats.ggml import BF16
from qtool.inputs.items import Item, Pair
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from tests.checks import surgery
from tests.checks.cases import CASES, PROMPT, REDERIVE, STRUCTURE, WEIGHTS
from tests.checks.stages import check_structure, compare_prompts, compare_weights, rederive
from tests.scoring import tiny

IN_FILES = [case for case in CASES if case.step != PROMPT]
SERVED = [case for case in CASES if case.step == PROMPT]
QUESTIONS = [
    Pair(Item("q", ("a small red ball",)), Item(f"d{place}", (text,)))
    for place, text in enumerate(("a red ball", "the blue cube is large", "a green ring", "two balls"))
]


def name_of(case):
    return f"{case.of.replace('/', '-')}-{case.name}"


def steps(artefact, reference, folder):
    """The stages, cheapest first, until one fails."""
    yield STRUCTURE, check_structure(artefact, reference)
    yield WEIGHTS, compare_weights(artefact, reference)[0]
    yield REDERIVE, rederive(artefact, reference, folder)[0]


@pytest.mark.parametrize("case", IN_FILES, ids=name_of)
def test_the_cheapest_step_finds_it(case, builder, tmp_path):
    artefact = shutil.copytree(builder.good(case.of), tmp_path / "artefact")
    more = (builder,) if "builder" in inspect.signature(case.breaks).parameters else ()
    case.breaks(artefact, *more)
    for step, stage in steps(artefact, builder.reference(case.of.partition("/")[0]), tmp_path):
        broken = [each.code for each in stage.findings if each.severity is Severity.BROKEN]
        if step == case.step:
            assert stage.outcome is Outcome.FAIL
            assert case.code in broken
            return
        assert (stage.outcome, broken) == (Outcome.PASS, []), step
    pytest.fail(f"nothing found it before {case.step}")


@pytest.mark.parametrize("kind", ["shape", "type"])
def test_the_same_bytes_under_another_shape_or_type_are_not_rederived(kind, builder, tmp_path):
    artefact, name = shutil.copytree(builder.good("reranker/gguf-f16"), tmp_path / "artefact"), "blk.1.ffn_up.weight"

    def change(tensors):
        output = tensors[name].output
        other = {"shape": output.shape[::-1]} if kind == "shape" else {"type": BF16}
        tensors[name] = replace(tensors[name], output=replace(output, **other))

    surgery.gguf(artefact, tensors=change)
    stage, table = rederive(artefact, builder.reference("reranker"), tmp_path)
    assert stage.outcome is Outcome.FAIL
    assert [each.code for each in stage.findings] == ["tensors-not-rederived"]
    assert [row.name for row in table if not row.is_equal] == [name]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model that minds every word of its prompt."""
    return tiny.write_vl(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def reader(model):
    return open_runtime(str(model), RuntimeOptions(task=Task.RERANK))


@pytest.mark.parametrize("case", SERVED, ids=name_of)
def test_a_runtime_that_reads_another_prompt_is_found_by_its_prompt(case, reader, model):
    stage = compare_prompts(reader, case.breaks(reader), QUESTIONS, model, "MODEL")
    assert stage.outcome is Outcome.FAIL
    assert {each.code for each in stage.findings} == {case.code}


def test_there_is_a_case_for_each_code():
    covered = {case.code for case in CASES}
    elsewhere = {
        "other-length", "mostly-unquantized", "other-minor-file", "narrower-type", "unread-field", "other-special-tokens", "other-chat-template",
        "blocks-otherwise-rounded", "scales-searched", "weights-prescaled", "weights-not-compared", "recipe-assumed", "files-not-rederived", "fields-not-rederived",
        "prompt-vision-template", "prompt-pictures", "prompt-untold", "unknown-field", "unread-quantization", "tensors-stored-wider",
        "prompt-no-instruction", "prompt-unknown", "other-task", "calibration-warning", "calibration-panel", "tokenizer-own-length",
        "rows-zero", "rows-differ", "record-contradicted", "fitted-by-bound", "source-not-recorded", "rederived-otherwise",
    }  # fmt: skip
    assert covered | elsewhere | set(SCORE_CODES) >= set(COMPARISON_CODES)  # tests/verify serves the faults of runtimes
    assert covered <= {*COMPARISON_CODES, *INSPECTED}
    assert not covered & elsewhere


@pytest.mark.parametrize("code", COMPARISON_CODES)
def test_every_code_is_one_plain_sentence(code):
    sentence = COMPARISON_CODES[code].sentence
    assert sentence.endswith((".", "}"))
    # A runtime's fault may need a second one, which says what to do where no command of qtool helps.
    assert sentence.count(". ") <= (code in SCORE_CODES and not COMPARISON_CODES[code].remedy)
    assert COMPARISON_CODES[code].remedy.split(" ")[0] in ("", "qtool", "hf")
