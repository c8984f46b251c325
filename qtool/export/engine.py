"""Writes planned tensors into GGUF files, a few megabytes at a time.

Rule: memory does not grow with the model; a piece is read, encoded and written by one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qtool.export.gguf_plan import PlannedGgufTensor
from qtool.export.sources import Piece
from qtool.progress import Advance
from qtool.storage.gguf_layout import GgufLayout, open_gguf
from qtool.storage.output import worker_pool


def write_tensors(
    layouts: Sequence[GgufLayout], tensors: Sequence[PlannedGgufTensor], folder: Path, advance: Advance
) -> Mapping[str, str]:
    """Write one file, or its parts, into `folder`; the SHA-256 of each header and tensor by name."""
    with open_gguf(layouts, folder) as files, worker_pool() as pool:

        def write(gguf_name: str, piece: Piece) -> None:
            start, nbytes, encode = piece
            files.write(gguf_name, start, encode())
            advance(nbytes)

        jobs = [
            pool.submit(write, tensor.output.gguf_name, piece)
            for tensor in tensors
            for piece in tensor.source.pieces(tensor.output.type)
        ]
        for job in jobs:
            job.result()
        return files.sha256()
