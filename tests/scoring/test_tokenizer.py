from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from qtool import resources
from qtool.arch import prompts
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item
from qtool.scoring.prompt import PromptBuilder
from qtool.scoring.tokenizer import PromptTokenizer
from tests.scoring import official, tiny


def test_special_ids_are_those_of_transformers(vl_model: Path, tokenizer: PromptTokenizer) -> None:
    assert tokenizer.special_ids == set(official.tokenizer(vl_model).all_special_ids)


def test_special_ids_without_a_declared_list_are_the_flagged_tokens(tmp_path: Path) -> None:
    made = tiny.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert PromptTokenizer.read(tmp_path).special_ids == {made.token_to_id(token) for token in tiny.SPECIAL}


def test_padding_saved_in_tokenizer_json_is_ignored(tmp_path: Path) -> None:
    made = tiny.write_tokenizer(tmp_path)
    made.enable_padding(length=64)
    made.enable_truncation(3)
    made.save(str(tmp_path / "tokenizer.json"))
    assert PromptTokenizer.read(tmp_path).encode("yes no yes no") == tiny.tokenizer().encode("yes no yes no").ids


def test_a_tokenizer_that_appends_the_end_token_gets_no_second_one(tmp_path: Path) -> None:
    made = tiny.write_tokenizer(tmp_path)
    end = "<|endoftext|>"
    special = [(end, made.token_to_id(end))]
    made.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=special)
    made.save(str(tmp_path / "tokenizer.json"))
    prompt = PromptBuilder(PromptTokenizer.read(tmp_path), prompts.TEXT_EMBEDDER).item(Item("d", ("yes " * 9000,)))
    assert len(prompt.token_ids) == 8192
    assert prompt.token_ids.count(made.token_to_id(end)) == 1
    assert prompt.token_ids[-1] == made.token_to_id(end)


def test_a_broken_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing"):
        PromptTokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="Cannot read the tokenizer"):
        PromptTokenizer.read(tmp_path)


@pytest.mark.parametrize("text", ["a \ud83d", None])
def test_what_is_no_text_is_the_users_mistake(tokenizer: PromptTokenizer, text: Any) -> None:
    with pytest.raises(UsageError, match="expected str without lone surrogates"):
        tokenizer.encode(text)


@pytest.mark.parametrize(
    "changes",
    [{"additional_special_tokens": 7}, {"pad_token": 1.5}, {"eos_token": {"text": "x"}}, {"bos_token": ["x"]}],
)
def test_a_special_token_that_is_none_is_an_error(changes, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resources.demo_model("qtool-demo-reranker") / name, tmp_path / name)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=f"{next(iter(changes))} is .*, expected"):
        PromptTokenizer.read(tmp_path)
