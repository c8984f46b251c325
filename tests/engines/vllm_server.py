"""A real vLLM on loopback: the program that `make engines` installs, serving one model until the caller is done.

It gets the flags that `qtool serve-command` prints, and otherwise only what a machine without a GPU needs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.upstream import ENGINES

PYTHON = ENGINES / "vllm" / "bin" / "python"
PATIENCE = 600
"""Seconds to wait for a start, most of which goes into imports: three processes import all of vLLM."""

_CPU = ("--dtype", "float32", "--enforce-eager")
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[str]:
    """Run `vllm serve MODEL …` with what it prints in `log`; gives the server's address."""
    port = _free_port()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _ENVIRONMENT
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*_program(command), "--host", "127.0.0.1", "--port", str(port), *_CPU],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def _program(command: Sequence[str]) -> list[str]:
    """The same without the `vllm` script, which looks for a distribution called vllm; this build's is vllm-cpu."""
    program, serve, model, *flags = command
    if (program, serve) != ("vllm", "serve"):
        raise ValueError(command)
    return [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags]


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if _is_healthy(url):
            return
        time.sleep(1)
    raise RuntimeError(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it and the processes that it started, which are a group of their own."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
