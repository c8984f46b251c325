"""Files that qtool converted once, and the scorers behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.scoring.llama_cpp.runtime import open_llama_cpp
from qtool.scoring.transformers.runtime import TransformersScorer, open_scorer
from tests.scoring.gguf_files import gguf_of, projector_of
from tests.scoring.llama_cpp.shared import ALONE, RERANKER


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="session")
def reference() -> TransformersScorer:
    return open_scorer(RERANKER)


@pytest.fixture(scope="module")
def reranker(folder):
    with open_llama_cpp(gguf_of(RERANKER, "f32", folder), projector_of(RERANKER, folder), ALONE) as scorer:
        yield scorer


@pytest.fixture(scope="session", autouse=True)
def engine():
    """What all of these tests need."""
    pytest.importorskip("xllamacpp")
