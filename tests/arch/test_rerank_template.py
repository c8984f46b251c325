"""The chat template renders, in the sandbox that engines use, what the scorer's prompt says."""

from __future__ import annotations

import json

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qtool.arch.prompts import TEXT_RERANKER, VL_RERANKER, rerank_template
from qtool.arch.spec import Task
from qtool.export.quantize import QuantizeOptions, quantize
from tests.tiny import text_config, vl_config, write_checkpoint

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
FILM = "<|vision_start|><|video_pad|><|vision_end|>"


def render(prompt, query, document, instruction=None, kwargs=None):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True
    )  # transformers' and vLLM's settings
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    system = [] if instruction is None else [{"role": "system", "content": instruction}]
    return environment.from_string(rerank_template(prompt)).render(
        messages=system + messages, add_generation_prompt=True, **(kwargs or {})
    )


@pytest.mark.parametrize("prompt", [VL_RERANKER, TEXT_RERANKER], ids=["vl", "text"])
@pytest.mark.parametrize(
    "text", ["plain", "  spaces and\nnewlines \n", 'quotes " and {braces} and {{ jinja }}', "漢字 🙂"]
)
def test_texts_stand_in_the_prompt_as_they_are(prompt, text):
    expected = prompt.template.replace("{instruction}", prompt.default_instruction)
    expected = expected.replace("{query}", "Q").replace("{document}", text)
    assert render(prompt, "Q", text) == expected
    assert render(prompt, "Q", [{"type": "text", "text": text}]) == expected


def test_an_instruction_replaces_the_default():
    assert "<Instruct>: Find it.<Query>:" in render(VL_RERANKER, "q", "d", "Find it.")
    assert "<Instruct>: Find it.<Query>:q\n<Document>:d<" in render(
        VL_RERANKER, "q", "d", kwargs={"instruction": "Find it."}
    )


@pytest.mark.parametrize("prompt", [VL_RERANKER, TEXT_RERANKER], ids=["vl", "text"])
def test_sglang_renders_the_official_prompt_too(prompt):
    """With the arguments that its /v1/rerank passes: two messages of one role for texts, variables for pictures."""
    template = ImmutableSandboxedEnvironment().from_string(rerank_template(prompt).replace("\\n", "\n"))
    expected = prompt.template.format(instruction="Find it.", query="Q's", document='"d"')
    texts = [{"role": "user", "content": text} for text in ("Q's", '"d"')]
    assert template.render(messages=texts, instruct="Find it.") == expected
    sides = {name: [{"type": "text", "text": text}] for name, text in (("query", "Q's"), ("document", '"d"'))}
    assert template.render(**sides, instruct="Find it.") == expected
    assert 'answer can only be "yes" or "no"' in rerank_template(prompt)  # by which it knows a reranker


def test_sides_are_in_the_official_order_and_null_when_empty():
    parts = [{"type": "text", "text": "words"}, {"type": "image"}, {"type": "video"}]
    assert f"<Document>:{FILM}{PICTURE}words<|im_end|>" in render(VL_RERANKER, "q", parts)
    assert "<Query>:NULL\n" in render(VL_RERANKER, "", "d")


@pytest.mark.parametrize(
    ("config", "task", "expected"),
    [
        (vl_config(), Task.RERANK, VL_RERANKER),
        (text_config(), Task.RERANK, TEXT_RERANKER),
        (vl_config(), Task.EMBED, None),
        (vl_config(), None, None),
        (text_config(architecture="Qwen3ForSequenceClassification", num_labels=1), None, None),
    ],
)
def test_rerankers_get_it_beside_their_weights(config, task, expected, tmp_path):
    model = write_checkpoint(tmp_path / "model", config)
    quantize(QuantizeOptions(model=str(model), output=tmp_path / "out", task=task))
    path = tmp_path / "out" / "rerank_template.jinja"
    assert path.exists() == (expected is not None)
    if expected:
        assert path.read_text() == rerank_template(expected)
        assert path.name in json.loads((tmp_path / "out" / "qtool.json").read_text())["files"]
