"""Servers that mean ill: each is left in time, in little memory, with an error that shows nothing that it should not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qtool.arch.spec import Task
from qtool.errors import QtoolError
from qtool.inputs.items import Item
from qtool.scoring.http.detect import ServerKind
from qtool.scoring.http.runtime import HttpOptions, open_http
from tests.hostile import CANARY, ECHOES, ENDLESS, SHOWN, WRONG, Mode, leaks, serving_raw
from tests.scoring.servers import many

SECONDS = 0.6
MOST_MEMORY = 128 << 20
"""Of all modes at once; a gigabyte is what the bombs would take."""


def asked(mode: Mode, task: Task | None, engine: ServerKind | None, model: str | None = "m") -> QtoolError | None:
    """The error of asking a server: first what it is, then a question."""
    options = HttpOptions(engine=engine, task=task, model=model, family="qwen3", timeout=SECONDS, retries=0)
    with serving_raw(mode) as url:
        try:
            with open_http(url, options) as scorer:
                if scorer.task is Task.RERANK:
                    scorer.score(many(1))
                else:
                    scorer.embed([Item("a", ("a",))])
        except QtoolError as error:
            return error
    return None


def problems(modes: Mapping[str, Mode], problem: Callable[[Mode], str]) -> dict[str, str]:
    """What is wrong by the name of the mode; all modes at once, since most of the time is waiting."""
    with ThreadPoolExecutor(8) as pool:
        return {name: found for name, found in zip(modes, pool.map(problem, modes.values()), strict=True) if found}


def peak() -> int:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


@pytest.mark.parametrize("engine", [None, ServerKind.JINA], ids=["detected", "jina"])
def test_what_has_no_end_is_left_in_time_and_in_little_memory(engine):
    def problem(mode):
        began = time.monotonic()
        error = asked(mode, Task.RERANK, engine)
        took = time.monotonic() - began
        if error is None or error.exit_code not in ((3, 5) if mode in errors else (5,)):
            return f"ended with {error!r}"
        return f"took {took:.1f} s" if took > 15 * SECONDS else ""

    # The beginning of an error's body is all that is wanted: to a question, 500 is an answer about the model.
    errors = [mode for name, mode in ENDLESS.items() if "error" in name]
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = peak()
    assert not problems(ENDLESS, problem)
    assert peak() - before < MOST_MEMORY


@pytest.mark.parametrize(
    ("engine", "task"),
    [
        (None, None),
        (ServerKind.JINA, Task.RERANK),
        (ServerKind.VLLM, Task.RERANK),
        (ServerKind.VLLM, Task.EMBED),
        (ServerKind.TEI, Task.EMBED),
        (ServerKind.LLAMA_SERVER, Task.EMBED),
    ],
)
def test_what_is_no_answer_is_an_error_of_the_model_or_the_network(engine, task):
    def problem(mode):
        error = asked(mode, task, engine)
        if error is None or error.exit_code not in (2, 3, 5):
            return f"ended with {error!r}"
        return "None" if "None" in error.message else ""

    assert not problems(WRONG, problem)


@pytest.mark.parametrize("engine", [None, ServerKind.JINA, ServerKind.VLLM])
def test_what_is_shown_of_an_answer_is_short_and_obeyed_by_no_terminal(engine):
    def problem(mode):
        error = asked(mode, None, engine, None)
        if error is None:
            return "no error"
        text = f"{error.message}{error.hint}{error}"
        if len(text) > 10_000:
            return f"{len(text)} characters"
        return "" if all(c.isprintable() or c == "\n" for c in text) else ascii(text)

    assert not problems(SHOWN, problem)


@pytest.mark.parametrize("engine", [None, ServerKind.JINA, ServerKind.VLLM])
def test_a_key_that_is_sent_back_is_shown_nowhere(engine, monkeypatch):
    def problem(mode):
        error = asked(mode, None, engine, None)
        if error is None:
            return "no error"
        return " ".join(leaks(f"{error!r} {error} {error.message} {error.hint} {error.args}"))

    monkeypatch.setenv("QTOOL_API_KEY", CANARY)
    assert not problems(ECHOES, problem)
