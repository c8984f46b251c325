"""How much memory this process has and could still get."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_CGROUP: Final = Path("/sys/fs/cgroup")


def resident_memory() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    try:
        pages = int((_PROC / "self" / "statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> int | None:
    """Bytes that can still be had without swapping, in this container; None where the system does not say."""
    known = [free for free in (_machine(), _container()) if free is not None]
    return min(known, default=None)


def _machine() -> int | None:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return _bytes(fields.get("MemAvailable", "").removesuffix("kB"), 1024)


def _container() -> int | None:
    """What the limit of this process's control group (version 2) leaves; its file cache can be had again."""
    try:
        own = (_PROC / "self" / "cgroup").read_text().strip().rpartition("::")[2]
        folder = _CGROUP / own.lstrip("/")
        folder = folder if (folder / "memory.max").is_file() else _CGROUP
        limit = _bytes((folder / "memory.max").read_text())
        used = _bytes((folder / "memory.current").read_text())
        parts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cached = _bytes(parts.get("inactive_file", "")) or 0
    return None if limit is None or used is None else max(limit - used + cached, 0)


def _bytes(text: str, unit: int = 1) -> int | None:
    text = text.strip()
    return int(text) * unit if text.isdigit() else None  # "max" is no limit
