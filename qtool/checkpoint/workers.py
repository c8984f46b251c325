"""The threads that read, encode and write.

Rule: they yield to the hasher. A file cannot be hashed faster than by one thread from its beginning, so whoever delays
that one delays the end.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

WORKERS: Final = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""The processors that this process may use: in a container or a batch job not all that there are."""


@contextmanager
def worker_pool() -> Iterator[ThreadPoolExecutor]:
    """A pool of one thread a processor; what is still queued is dropped when the block ends."""
    pool = ThreadPoolExecutor(max_workers=WORKERS, initializer=_yield_to_the_hasher)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _yield_to_the_hasher() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(
            os.PRIO_PROCESS, threading.get_native_id(), 3
        )  # half its weight: on two cores the hasher has one
