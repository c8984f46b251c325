from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.arch.prompts import PromptSpec
from qtool.scoring.prompt import PromptBuilder
from qtool.scoring.tokenizer import PromptTokenizer
from tests.scoring import tiny


@pytest.fixture(scope="session")
def vl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_vl(tmp_path_factory.mktemp("models") / "vl")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("models") / "text", tied=False)


@pytest.fixture(scope="session")
def tokenizer(vl_model: Path) -> PromptTokenizer:
    return PromptTokenizer.read(vl_model)


@pytest.fixture
def builder(tokenizer: PromptTokenizer) -> Callable[[PromptSpec], PromptBuilder]:
    return lambda spec: PromptBuilder(tokenizer, spec)
