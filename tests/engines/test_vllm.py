"""A real vLLM scores the demo models, published and quantized, as qtool does."""

from __future__ import annotations

import pytest

from qtool.arch.spec import Task
from qtool.inputs.items import Pair
from tests.engines.comparison import CASES, PANELS, awkward, opened, sides
from tests.engines.vllm_server import PYTHON

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON.exists(), reason="no vLLM in .engines: run `make engines`"),
]

# Measured over all cases and panels: 6.4e-6 log-odds and 1.3e-7 of cosine, float32 against float32.
LOG_ODDS, COSINE = 1e-5, 5e-7


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def model(request, tmp_path_factory):
    with opened(request.param, tmp_path_factory.mktemp("vllm")) as both:
        yield both


@pytest.mark.parametrize("questions", PANELS)
def test_vllm_answers_as_qtool_does(model, questions):
    row = model.row(questions)
    assert row.distance < (LOG_ODDS if model.case.task is Task.RERANK else COSINE)
    assert row.count >= 7


def test_vllm_reads_the_very_prompt(model):
    questions = awkward()
    for question in questions if model.case.task is Task.RERANK else sides(questions):
        assert model.served.prompt_seen(question) == model.own.prompt_seen(question), question


def test_an_instruction_reaches_the_model(model):
    pair = awkward()[0]
    instructed = Pair(pair.query.with_instruction("Find the same shape."), pair.document)
    if model.case.task is Task.RERANK:
        plain, other = model.served.score([pair, instructed])
        assert abs(plain - other) > 100 * LOG_ODDS
    else:
        plain, other = model.served.embed([pair.query, instructed.query])
        assert 1 - plain @ other > 100 * COSINE
