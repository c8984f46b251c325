"""Opens GGUF files for several writers.

Rule: every tensor is hashed by itself, and the header too. One file has one stream of SHA-256 but many tensors, which are
hashed side by side; their hashes together say as much as the file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from qtool.checkpoint.hashing import Extent
from qtool.checkpoint.output_files import OutputFiles, Place, created, open_outputs
from qtool.gguf_file.layout import GgufLayout

HEADER: Final = "header of {}"
"""The name under which a file's header is hashed."""


SLICE: Final = 64 << 20
"""Larger tensors are hashed in slices of this size, or the embedding would take longer than all the rest."""


def hash_names(name: str, nbytes: int) -> list[str]:
    """Under which names the hashes of a tensor's slices go; a small one has just its own."""
    slices = max(1, -(-nbytes // SLICE))
    return [name] if slices == 1 else [f"{name} {number}/{slices}" for number in range(1, slices + 1)]


@contextmanager
def open_gguf(layouts: Sequence[GgufLayout], folder: Path) -> Iterator[OutputFiles]:
    """Create the parts of one GGUF file; tensors are written by their names."""
    with ExitStack() as stack:
        extents: dict[str, Extent] = {}
        places: dict[str, Place] = {}
        for layout in layouts:
            descriptor = stack.enter_context(created(folder / layout.file_name, layout.nbytes))
            whole = {HEADER.format(layout.file_name): (0, len(layout.header)), **layout.places}
            for name, (offset, nbytes) in whole.items():
                places[name] = Place(descriptor, offset, len(extents), 0, SLICE)
                for number, part in enumerate(hash_names(name, nbytes)):
                    start = number * SLICE
                    extents[part] = Extent(descriptor, offset + start, min(SLICE, nbytes - start))
        headers = [(HEADER.format(layout.file_name), layout.header) for layout in layouts]
        yield stack.enter_context(open_outputs(places, extents, headers))
