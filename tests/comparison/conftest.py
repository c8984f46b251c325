"""Good artefacts, made once a session, and copies to break."""

from __future__ import annotations

import pytest

from tests.comparison.good import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """Maker of good artefacts."""
    return Workshop(tmp_path_factory.mktemp("good"))
