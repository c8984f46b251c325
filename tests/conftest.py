"""For the whole suite."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

settings.register_profile("qtool", deadline=None)  # the first example of many a test compiles a kernel
settings.load_profile("qtool")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Answers kept by one run of the tests must not serve another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# As qtool.scoring does, for tests that import torch before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Shells start background jobs deaf to Ctrl-C, and some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
