"""What the system refuses while a file or folder of answers is written, as an error that names the place.

Rule: one sentence for all of them; a full disk and a forbidden folder are matters of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtool.errors import SetupError


@contextmanager
def named_write_errors(place: Path) -> Iterator[None]:
    """Raise SetupError for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"{place} cannot be written: {error.strerror}.", "Choose another place, or free some space."
        ) from error
