from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from tools.demo_models.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_tokenizer()
