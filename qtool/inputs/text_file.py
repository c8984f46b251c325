"""Text files of users.

Rule: UTF-8, and what is not is an error that names the line, which an editor finds.
"""

from __future__ import annotations

from pathlib import Path

from qtool.errors import UsageError


def read_text_bytes(path: Path, what: str) -> bytes:
    """The content of a file, which is UTF-8. Raises UsageError, calling the file `what`."""
    try:
        content = path.read_bytes()
        content.decode()
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        place = error.start - error.object.rfind(b"\n", 0, error.start)
        raise UsageError(
            f"{path.name}, line {line}: not UTF-8 text (byte {place} of the line is 0x{error.object[error.start]:02x})",
            "Save it as UTF-8.",
        ) from error
    return content
