"""What is measured, and the goals that it is held to."""

from __future__ import annotations

import json
import platform
from pathlib import Path

from tests import upstream
from tests.bench.goals import Goal, Jobs, Measured, faster, qtool, source_bytes, within
from tests.bench.hub import hub_goals, hub_jobs
from tests.bench.layers import layers_goals, layers_jobs
from tests.bench.processes import run
from tests.bench.scoring import score_goals, score_jobs


def quantize_jobs(folder: Path, shapes: list[str]) -> Jobs:
    """`cp`, streaming and ModelOpt; each writes `folder`/out."""
    out = str(folder / "out")
    jobs: Jobs = {}
    for shape in shapes:
        source = str(folder / shape)
        jobs[f"{shape} cp"] = ["cp", "-r", source, out]
        jobs[f"{shape} streaming"] = qtool("quantize", source, "-o", out, "--backend", "streaming")
        if shape == "2B":
            jobs[f"{shape} streaming, no SHA"] = without_sha(jobs[f"{shape} streaming"])
            jobs[f"{shape} modelopt"] = qtool("quantize", source, "-o", out, "--backend", "modelopt")
    return jobs


def quantize_goals(folder: Path) -> list[Goal]:
    """Speed against ModelOpt and `cp`, memory, and time in proportion to size."""

    def per_byte(measured: Measured, shape: str) -> float:
        return measured[f"{shape} streaming"].seconds / source_bytes(folder / shape)

    streaming = "2B streaming"
    return [
        faster("2B: streaming over ModelOpt", "2B modelopt", streaming, 15),
        Goal("2B: streaming over cp, at most 2 times its time", lambda m: m[streaming].seconds / m["2B cp"].seconds,
             ("2B cp", streaming), most=2),
        Goal("2B: the same without SHA instructions, over cp, at most 2 times its time",
             lambda m: m[f"{streaming}, no SHA"].seconds / m["2B cp"].seconds, ("2B cp", f"{streaming}, no SHA"), most=2),
        within("2B: streaming", streaming, 600),
        within("8B: streaming", "8B streaming", 600),
        Goal("8B over 2B, seconds per byte of checkpoint, at most 1.2", lambda m: per_byte(m, "8B") / per_byte(m, "2B"),
             (streaming, "8B streaming"), most=1.2),
    ]  # fmt: skip


def without_sha(command: list[str]) -> list[str]:
    """The command as it runs on an x86-64 processor without SHA instructions; elsewhere the command itself.

    OpenSSL, which hashlib calls, is told that bit 29 of EBX of CPUID leaf 7 is not set.
    """
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return ["env", "OPENSSL_ia32cap=~0:~0x20000000", *command] if is_x86 else command


def convert_jobs(folder: Path, shapes: list[str]) -> Jobs:
    """qtool and llama.cpp's converter, language file only; each writes `folder`/out or `folder`/out.gguf."""
    jobs: Jobs = {}
    named = _named_as_reranker(folder)
    for outtype in ("f16", "q8_0", "nvfp4"):
        source = packed_2b(folder) if outtype == "nvfp4" else named
        ours = [str(source), "-o", str(folder / "out"), "--outtype", outtype, "--mmproj", "none"]
        jobs[f"2B {outtype} qtool"] = qtool("convert-gguf", *ours)
        jobs[f"2B {outtype} qtool, no SHA"] = without_sha(jobs[f"2B {outtype} qtool"])
        theirs = "bf16" if outtype == "nvfp4" else outtype  # of what is not packed
        jobs[f"2B {outtype} upstream"] = upstream.command(source, folder / "out.gguf", theirs)
    if "8B" in shapes:
        ours = [str(folder / "8B"), "-o", str(folder / "out"), "--outtype", "q8_0", "--mmproj", "none"]
        jobs["8B q8_0 qtool"] = qtool("convert-gguf", *ours)
    return jobs


def convert_goals(_folder: Path) -> list[Goal]:
    """Speed against llama.cpp's converter, and memory."""
    types = ("f16", "q8_0", "nvfp4")
    return [
        *(faster(f"2B {t}: qtool over llama.cpp's converter", f"2B {t} upstream", f"2B {t} qtool", 3) for t in types),
        *(within(f"2B {t}: qtool", f"2B {t} qtool", 800) for t in types),
        within("8B q8_0: qtool", "8B q8_0 qtool", 800),
    ]


def _named_as_reranker(folder: Path) -> Path:
    """llama.cpp's converter goes by the folder's name."""
    link = folder / "qwen3-vl-reranker-2b"
    if not link.exists():
        link.symlink_to((folder / "2B").absolute())
    return link


def packed_2b(folder: Path) -> Path:
    """The 2B checkpoint in NVFP4, made once."""
    packed = folder / "qwen3-vl-reranker-2b-nvfp4"
    if not packed.exists():
        run(qtool("quantize", str(folder / "2B"), "-o", str(packed)), folder / "log")
        (packed / "modules.json").write_text((folder / "2B" / "modules.json").read_text())
        assert json.loads((packed / "config.json").read_text())["quantization_config"]
    return packed


SUITES = {
    "quantize": (quantize_jobs, quantize_goals),
    "convert": (convert_jobs, convert_goals),
    "score": (score_jobs, score_goals),
    "hub": (hub_jobs, hub_goals),
    "layers": (layers_jobs, layers_goals),
}
