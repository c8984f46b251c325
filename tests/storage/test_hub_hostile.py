"""A Hub that means ill, or a mirror or proxy on the way to it: it is left in time and in little memory."""

from __future__ import annotations

import re
import time
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from qtool import transfer
from qtool.checks.inspect import inspect
from qtool.doctor import _hub_answer
from qtool.errors import QtoolError
from tests.hostile import ENDLESS, serving_raw

SECONDS = 0.3
MOST_MEMORY = 160 << 20


def peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


@pytest.fixture
def impatient(monkeypatch):
    """Minutes become fractions of a second."""
    monkeypatch.setattr(transfer, "_SLOW_SECONDS", SECONDS)
    monkeypatch.setattr("qtool.doctor._HUB_SECONDS", SECONDS)
    monkeypatch.setattr("qtool.retries.FIRST_PAUSE", 0.01)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("qtool.storage.hub_repository._PAGE_SECONDS", 4 * SECONDS)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", _impatient(huggingface_hub.HfApi.model_info))
    yield
    huggingface_hub.close_session()


def _impatient(method):
    return lambda *arguments, **options: method(*arguments, **{**options, "timeout": SECONDS})


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("mode", ENDLESS.values(), ids=ENDLESS)
def test_a_hub_without_end_is_left(mode, monkeypatch):
    with serving_raw(mode) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        Path("/proc/self/clear_refs").write_text("5")
        before, began = peak(), time.monotonic()
        with pytest.raises(QtoolError) as caught:
            inspect("org/model")
        assert caught.value.exit_code in (3, 5), caught.value.message
        assert _hub_answer(url).state in ("wrong", "ok")  # a 401 is an answer
        assert time.monotonic() - began < 20
        assert peak() - before < MOST_MEMORY


def test_the_session_of_huggingface_hub_is_guarded_once():
    client = transfer.hub_session()
    assert transfer.hub_session() is client
    assert client is huggingface_hub.get_session()
    assert client.event_hooks["response"].count(transfer._bound_page) == 1
    assert isinstance(client, httpx.Client)
