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


@contextmanager
def open_gguf(layouts: Sequence[GgufLayout], folder: Path) -> Iterator[OutputFiles]:
    """Create the parts of one GGUF file; tensors are written by their names."""
    with ExitStack() as stack:
        extents: dict[str, Extent] = {}
        for layout in layouts:
            descriptor = stack.enter_context(created(folder / layout.file_name, layout.nbytes))
            extents[HEADER.format(layout.file_name)] = Extent(descriptor, 0, len(layout.header))
            for gguf_name, (offset, nbytes) in layout.places.items():
                extents[gguf_name] = Extent(descriptor, offset, nbytes)
        places = {name: Place(e.descriptor, e.start, index, 0) for index, (name, e) in enumerate(extents.items())}
        headers = [(HEADER.format(layout.file_name), layout.header) for layout in layouts]
        yield stack.enter_context(open_outputs(places, extents, headers))
