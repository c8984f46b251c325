"""Servers that mean ill: each is left in time, in little memory, with an error that shows nothing that it should not."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from qtool.arch.spec import Task
from qtool.errors import QtoolError
from qtool.inputs.items import Item
from qtool.scoring.http.runtime import HttpOptions, open_http
from tests.hostile import ECHOES, ENDLESS, SHOWN, WRONG, leaks, serving_raw
from tests.scoring.servers import many

SECONDS = 0.6
LEAST_MEMORY = 96 << 20


def asked(mode, task=Task.RERANK, engine=None, **options):
    """The error of asking a server: first what it is, then a question."""
    from qtool.scoring.http.detect import ServerKind

    kind = ServerKind(engine) if engine else None
    chosen = HttpOptions(engine=kind, task=task, family="qwen3", timeout=SECONDS, retries=1, **options)
    with serving_raw(mode) as url:
        try:
            with open_http(url, chosen) as scorer:
                scorer.score(many(1)) if task is Task.RERANK else scorer.embed([Item("a", ("a",))])
        except QtoolError as error:
            return error
    return None


def memory() -> int:
    """The most memory that this process had since `forget_memory`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10


def forget_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.parametrize("model", [{"model": "m"}, {}], ids=["asked", "detected"])
@pytest.mark.parametrize("mode", ENDLESS.values(), ids=ENDLESS)
def test_what_has_no_end_is_left_in_time_and_in_little_memory(mode, model):
    forget_memory()
    before, began = memory(), time.monotonic()
    error = asked(mode, **model)
    took = time.monotonic() - began
    assert error is not None
    assert error.exit_code == 5, error.message
    assert took < 10 * SECONDS, f"{took:.1f} s"
    assert memory() - before < LEAST_MEMORY


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("engine", ["jina", "vllm", "tei", "llama-server"])
@pytest.mark.parametrize("mode", WRONG.values(), ids=WRONG)
def test_what_is_no_answer_is_an_error_of_the_model_or_the_network(mode, engine, task):
    error = asked(mode, task, engine, model="m")
    assert error is not None
    assert error.exit_code in (2, 3, 5), error.message


@pytest.mark.parametrize("mode", WRONG.values(), ids=WRONG)
def test_a_server_that_says_nothing_sensible_of_itself_is_no_crash(mode):
    for task in (None, *Task):
        error = asked(mode, task)
        assert error is not None
        assert error.exit_code in (2, 3, 5), error.message


@pytest.mark.parametrize("mode", [*SHOWN.values(), *WRONG.values()], ids=[*SHOWN, *WRONG])
def test_what_is_shown_of_an_answer_is_short_and_obeyed_by_no_terminal(mode):
    for engine in (None, "jina"):
        error = asked(mode, engine=engine)
        assert error is not None
        for text in (error.message, error.hint, str(error)):
            assert len(text) < 5000
            assert all(c.isprintable() or c == "\n" for c in text), ascii(text)
            assert "None" not in text


@pytest.mark.parametrize("mode", ECHOES.values(), ids=ECHOES)
def test_a_key_that_is_sent_back_is_shown_nowhere(mode, monkeypatch):
    monkeypatch.setenv("QTOOL_API_KEY", "sk-canary-4f1d9A/7b+2e=c08")
    for engine in (None, "jina", "vllm"):
        error = asked(mode, engine=engine)
        assert error is not None
        while error is not None:
            assert not leaks(f"{error} {error.args} {getattr(error, 'message', '')} {getattr(error, 'hint', '')}")
            error = error.__cause__ if isinstance(error.__cause__, QtoolError) else None
    assert os.environ["QTOOL_API_KEY"]
