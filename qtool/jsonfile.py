"""The JSON files of a checkpoint: reading with errors that name file and position, and the bytes to write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtool.errors import ModelError


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON object (or list) in `path`. Raises ModelError with the file and the position."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing from {path.parent}.") from None
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:  # also a number of more than 4,300 digits
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, kind):
        raise ModelError(f"{path} contains a JSON {type(value).__name__}; expected a {kind.__name__}.")
    return value


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """`value` as the indented UTF-8 text that model repositories keep."""
    return (json.dumps(value, indent=4, ensure_ascii=False) + "\n").encode()
