"""Tensors between layers: in memory up to a number of bytes, the rest in a scratch file."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch

from qtool.console import human_size
from qtool.errors import SetupError

if TYPE_CHECKING:
    from typing_extensions import Self


class ActivationStore:
    """Tensors by key; one that is put again keeps its shape and its place.

    The scratch file is read and written, not mapped: mapped pages would count as this process's memory.
    """

    def __init__(self, memory: int, device: torch.device, folder: Path | None = None) -> None:
        """`folder` is where the scratch file lies, by default that of temporary files."""
        self._memory = memory
        self._used = 0
        self._lock = threading.Lock()  # of what is not atomic: finding a place
        self._device = device
        self._kept: dict[Hashable, torch.Tensor] = {}
        self._stored: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: IO[bytes] | None = None
        self._end = 0
        self._folder = folder or Path(tempfile.gettempdir())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def beside(self) -> ActivationStore:
        """Another store, which has the memory that this one does not use yet."""
        return ActivationStore(max(self._memory - self._used, 0), self._device, self._folder)

    def limit(self, memory: int) -> None:
        """Keep what comes from now on in memory only up to this number of bytes in all."""
        self._memory = memory

    def __setitem__(self, key: Hashable, tensor: torch.Tensor) -> None:
        with self._lock:
            if key not in self._stored and (key in self._kept or self._used + tensor.nbytes <= self._memory):
                self._used += 0 if key in self._kept else tensor.nbytes
                self._kept[key] = tensor.cpu()
                return
            if key not in self._stored:
                self._stored[key] = (self._end, tensor.shape, tensor.dtype)
                self._end += tensor.nbytes
        self._write(self._stored[key][0], tensor)

    def __getitem__(self, key: Hashable) -> torch.Tensor:
        if key in self._kept:
            return self._kept[key].to(self._device)
        offset, shape, dtype = self._stored[key]
        tensor = torch.empty(shape, dtype=dtype)
        _transfer(os.preadv, self._scratch(), tensor, offset)
        return tensor.to(self._device)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept or key in self._stored

    def _write(self, offset: int, tensor: torch.Tensor) -> None:
        _require_disk(self._folder, tensor.nbytes)
        _transfer(os.pwritev, self._scratch(), tensor.cpu().contiguous(), offset)

    def _scratch(self) -> int:
        with self._lock:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="qtool-", dir=self._folder)  # noqa: SIM115 - closed by __exit__
            return self._file.fileno()


def _transfer(call: object, descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    """Read or write all bytes of a tensor on the CPU; one call moves at most 2 GiB."""
    data = tensor.view(-1).view(torch.uint8).numpy()
    done = 0
    while done < len(data):
        moved = call(descriptor, [data[done : done + (1 << 30)].data], offset + done)  # type: ignore[operator]
        if moved == 0:
            raise SetupError("The scratch file of the run ended early: the temporary folder was cleaned.")
        done += moved


def _require_disk(folder: Path, nbytes: int) -> None:
    if shutil.disk_usage(folder).free < nbytes:
        raise SetupError(
            f"There is not enough disk space in {folder} for {human_size(nbytes)} of hidden states.",
            "Free space, set TMPDIR to another folder, or pass a larger --memory.",
        )
