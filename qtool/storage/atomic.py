"""Atomic writes: output is staged beside its place, synced, and renamed last."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from qtool.errors import QtoolError, SetupError, UsageError

PARTIAL: Final = ".partial"
"""The suffix of what is not complete yet."""

_PREVIOUS: Final = ".previous"
_NEW: Final = ".new"
_MARKER: Final = "qtool.json"
_OUT_OF_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def staged_folder(target: Path, *, force: bool = False) -> AbstractContextManager[Path]:
    """A folder `TARGET.partial` to fill, renamed to `target` when the block ends and removed when it fails.

    Raises UsageError when `target` exists (`force` replaces what qtool made) or another run is filling the folder, and
    SetupError for what the system refuses.
    """
    check_target(target, force=force)
    return _staged(target, _put_in_place)


def staged_files(target: Path, *, force: bool = False) -> AbstractContextManager[Path]:
    """The same for a file: what the folder `TARGET.partial` holds is moved beside `target`, and `target` itself last."""
    check_target_file(target, force=force)
    return _staged(target, _move_out)


def check_target(target: Path, *, force: bool) -> None:
    """Raise UsageError unless the folder `target` may be written: it is not there, or `force` and qtool made it."""
    refuse_existing(target, _is_replaceable, f"no {_MARKER} in it", force=force)


def check_target_file(target: Path, *, force: bool) -> None:
    """The same for a file, which has its manifest beside it."""
    refuse_existing(target, _has_manifest, f"no {manifest_of(target).name} beside it", force=force)


def refuse_existing(target: Path, is_ours: Callable[[Path], bool], sign: str, *, force: bool) -> None:
    """Raise UsageError where `target` exists, with `force` only where not `is_ours`; `sign` says what showed that."""
    if not (target.exists() or target.is_symlink()):
        return
    if not force:
        raise UsageError(f"{target} already exists.", "Choose another --output, or pass --force to replace it.")
    if not is_ours(target):
        raise UsageError(
            f"{target} was not made by qtool ({sign}), so --force does not replace it.",
            "Choose another --output, or remove it.",
        )


def manifest_of(target: Path) -> Path:
    """The path of the manifest of a single output file."""
    return target.with_name(f"{target.name}.{_MARKER}")


def _is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or (folder / _MARKER).is_file())


def _has_manifest(file: Path) -> bool:
    return file.is_file() and manifest_of(file).is_file()


def require_space(target: Path, nbytes: int) -> None:
    """Raise SetupError unless the disk that will hold `target` has `nbytes` free."""
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise SetupError(
            f"{target} needs {nbytes:,} bytes; {existing} has {free:,} free.",
            "Free some space, or choose an --output on another disk.",
        )


@contextmanager
def _staged(target: Path, finish: Callable[[Path, Path], None]) -> Iterator[Path]:
    partial = target.with_name(target.name + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            yield partial
            _sync_tree(partial)
            finish(partial, target)
    except OSError as error:
        raise _explained(error, target) from error


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """An empty folder `partial`, this run's alone, which is removed at the end.

    The lock ends with its process: the folder of a killed run can be told from that of a run that still goes on.
    """
    descriptor = -1
    is_locked = is_others = False
    try:  # around the first line too: Ctrl-C may come right after the folder is made
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            is_others = True
            raise UsageError(
                f"Another run is writing {partial}.", "Wait until it has ended, or choose another --output."
            ) from None
        _empty(partial)
        yield
    finally:
        if is_locked:
            shutil.rmtree(partial, ignore_errors=True)
        elif not is_others:
            with suppress(OSError):
                partial.rmdir()
        if descriptor >= 0:
            os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(partial: Path, target: Path) -> None:
    previous = target.with_name(target.name + _PREVIOUS)
    if target.exists():
        target.rename(previous)
    partial.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _move_out(partial: Path, target: Path) -> None:
    for path in sorted(partial.iterdir(), key=lambda path: path.name == target.name):
        path.replace(target.with_name(path.name))


def _explained(error: OSError, target: Path) -> QtoolError:
    if error.errno in _OUT_OF_SPACE:
        return SetupError(
            f"The disk filled up while {target} was written.",
            "Nothing was kept. Free some space, and run the command again.",
        )
    return SetupError(f"{target} could not be written: {error}.")


@contextmanager
def named_write_errors(place: Path) -> Iterator[None]:
    """Raise a SetupError that names `place` for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"{place} cannot be written: {error.strerror}.", "Choose another path, or free some space."
        ) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path`, synced, when the block ends well. Raises SetupError."""
    new = path.with_name(f"{path.name}{_NEW}")
    try:
        with named_write_errors(path):
            with new.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
    finally:
        with suppress(OSError):
            new.unlink()
