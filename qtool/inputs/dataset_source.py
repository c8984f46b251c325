"""The rows of a data set, streamed by the package `datasets`.

Rule: no more is fetched than is read, and pictures come as the bytes that the data set holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from qtool.errors import NetworkError, QtoolError, UsageError
from qtool.inputs.sources import opened

_SPLITS: Final = ("test", "validation", "train")
_PICTURE_BYTES: Final = 128 << 20
_PICTURE_SECONDS: Final = 60.0
_FORMATS: Final = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """Rows with the names by which messages call them, and the licence of the data set as far as it tells."""

    rows: Iterator[tuple[str, Mapping[str, Any]]]
    license: str


def open_rows(path: str, config: str | None, split: str | None, revision: str | None) -> Rows:
    """The rows of one split. Raises UsageError where there is none, NetworkError where the hub does not answer."""
    try:
        splits = _opened(path, config, revision)
    except Exception as error:  # `datasets` and what it stands on share no base class below Exception
        raise _explained(path, error) from error
    found = _split(path, splits, split)
    return Rows(_rows(path, _undecoded(found)), str(found.info.license or ""))


def read_picture(path: str) -> bytes:
    """A picture that a data set keeps in a file of its own, here or on the hub, perhaps within an archive."""
    if "://" not in path:
        found = opened(path, _PICTURE_BYTES, _PICTURE_SECONDS)
        return found.read_bytes() if isinstance(found, Path) else found.getvalue()
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            content: bytes = file.read()
    except Exception as error:  # as above
        raise _explained(path, error) from error
    return content


def _opened(path: str, config: str | None, revision: str | None) -> Any:
    import datasets

    local = Path(path)
    if not local.exists() and (local.suffix in _FORMATS or path.startswith((".", "~", "/"))):
        raise UsageError(f"There is no file or folder {path}.")
    if not local.is_file():
        return datasets.load_dataset(path, config, revision=revision, streaming=True)
    if local.suffix not in _FORMATS:
        raise UsageError(f"{path} is no data set.", f"Files of one end in {', '.join(_FORMATS)}.")
    return datasets.load_dataset(_FORMATS[local.suffix], data_files=path, streaming=True)


def _split(path: str, splits: Mapping[str, Any], wanted: str | None) -> Any:
    for name in (wanted,) if wanted else (*_SPLITS, *splits):
        if name in splits:
            return splits[name]
    raise UsageError(f"Data set {path} has no split {wanted!r}.", f"It has {', '.join(splits)}.")


def _undecoded(rows: Any) -> Any:
    import datasets

    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return rows


def _rows(path: str, rows: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        for number, values in enumerate(rows, start=1):
            yield f"Data set {path}, row {number}", values
    except QtoolError:
        raise
    except Exception as error:  # as above
        raise _explained(f"{path}, after row {number}", error) from error


def _explained(path: str, error: Exception) -> QtoolError:
    import httpx

    if isinstance(error, QtoolError):
        return error
    if isinstance(error, ConnectionError | httpx.TransportError | TimeoutError):
        return NetworkError(f"Data set {path} could not be read: {error}", "Check the network.")
    return UsageError(f"Data set {path} could not be read: {error}")
