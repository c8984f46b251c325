from __future__ import annotations

from pathlib import Path

import pytest

from tests.scoring import tiny


@pytest.fixture(scope="session")
def vl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_vl(tmp_path_factory.mktemp("models") / "vl")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("models") / "text", tied=False)
