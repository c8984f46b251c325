"""For the whole suite."""

from __future__ import annotations

import logging
import os
import signal

import pytest
from hypothesis import settings

from qtool import console

settings.register_profile("qtool", deadline=None)  # the first example of many a test compiles a kernel
settings.load_profile("qtool")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Answers kept by one run of the tests must not serve another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QTOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _own_output():
    """What a command line sets for the whole process (--quiet, --verbose) ends with the test."""
    before = dict(vars(console.settings))
    yield
    vars(console.settings).update(before)
    logging.disable(logging.NOTSET)


# As qtool.scoring does, for tests that import torch before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Shells start background jobs deaf to Ctrl-C, and some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
