"""Repeats a request that failed for a reason that may pass: which statuses do, and how long to wait in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

# huggingface_hub's `http_backoff` does this for one request of its own session. Here whole exchanges are repeated (a
# body that ends early, a client with its own timeouts, a call of HfApi), and a pause can be cut short.

TRANSIENT_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses of hubs, stores and proxies that are busy or restarting."""
FIRST_PAUSE: Final = 0.5
"""Seconds before the second attempt; each further pause is twice as long."""
LONGEST_PAUSE: Final = 30.0

ResultT = TypeVar("ResultT")


def with_retries(
    request: Callable[[], ResultT],
    *,
    retries: int,
    pause_after: Callable[[Exception], float | None],
    wait: Callable[[float], bool | None] = time.sleep,
) -> ResultT:
    """The result of `request`, repeated up to `retries` times; raises the last error.

    `pause_after(error)` is None where another attempt is pointless, else the least number of seconds before it.
    `wait(seconds)` returns True where no further attempt is wanted.
    """
    pause, left = FIRST_PAUSE, retries
    while True:
        try:
            return request()
        except Exception as error:
            least = pause_after(error)
            # `wait` is called after the attempt and not before: a cancelled one may have failed for that reason.
            if least is None or left <= 0 or wait(max(least, pause)):
                raise
        pause, left = min(2 * pause, LONGEST_PAUSE), left - 1
