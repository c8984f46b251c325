"""How many threads a job may use, and the pool of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

WORKERS: Final = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""The processors that this process may use: in a container or a batch job not all that there are."""


@contextmanager
def worker_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool of one thread a processor; what is still queued is dropped when the block ends."""
    pool = ThreadPoolExecutor(max_workers=WORKERS)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
