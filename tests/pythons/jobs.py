"""What works in the base install: commands on the demo models, in an order in which each finds the files of earlier ones.

`make test-pythons` runs them by every Python of the machine, tests/test_extras.py with the extras' packages hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

RERANKER, EMBEDDER = "qtool-demo-reranker", "qtool-demo-embedder"
WITHOUT_SCORES = ("--structure-only", "--weights", "--rederive")


@dataclass(frozen=True)
class Job:
    """A command line; with `extra` it needs more than the base install, and exits 4 with the command that installs it."""

    arguments: tuple[str, ...]
    extra: str = ""

    def problem(self, code: int, stderr: str) -> str:
        """What is wrong with how it ended; empty where nothing is."""
        if not self.extra:
            return "" if code == 0 else f"exit {code}: {stderr}"
        hint = f"pip install 'qtool-retrieval[{self.extra}]'"
        return "" if code == 4 and hint in stderr else f"exit {code} instead of 4 with {hint!r}: {stderr}"


def job(line: str, *more: str, extra: str = "") -> Job:
    return Job((*line.split(), *more), extra)


JOBS = (
    job("--version"),
    job("--help"),
    job("recipes"),
    job("recipes nvfp4-w4a16"),
    job("doctor"),
    job(f"inspect {RERANKER}"),
    job(f"quantize {RERANKER} --dry-run"),
    job(f"quantize {RERANKER} --output nvfp4"),
    job(f"quantize {EMBEDDER} --output nvfp4-embedder --json"),
    job("inspect nvfp4"),
    job("serve-command nvfp4 --engine vllm"),
    job(f"verify nvfp4 --reference {RERANKER} --output report", *WITHOUT_SCORES),
    job(f"verify nvfp4-embedder --reference {EMBEDDER}", *WITHOUT_SCORES),
    job("convert-gguf nvfp4 --output nvfp4.gguf --mmproj none"),
    job(f"verify nvfp4.gguf --reference {RERANKER}", *WITHOUT_SCORES),
    job(f"convert-gguf {EMBEDDER} --output embedder --outtype f16,q8_0"),
    job(f"convert-gguf {RERANKER} --output broken.gguf --outtype f16 --prompt llamacpp"),
    job("repair-gguf broken.gguf --output repaired.gguf"),
    job("inspect repaired.gguf --task rerank"),
    job("serve-command repaired.gguf --engine llama-server"),
    job(f"verify repaired.gguf --reference {RERANKER}", *WITHOUT_SCORES),
    job(f"quantize {RERANKER} --output modelopt --backend modelopt", extra="modelopt"),
    job(f"score {RERANKER} --panel demo-text", extra="score"),
    job(f"embed {EMBEDDER} --panel demo-text --output vectors.npy", extra="score"),
    job(f"verify nvfp4 --reference {RERANKER}", extra="score"),
    job("demo --output demo", extra="score"),
    job("score repaired.gguf --panel demo-text", extra="llamacpp"),
    job("score repaired.gguf --dataset org/name --columns query=q,positive=p", extra="datasets"),
)
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
"""Else `doctor` asks the hub, and a narrow terminal breaks the hint."""
