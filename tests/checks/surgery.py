"""Cuts into artefacts: weights as raw bits, JSON files, GGUF fields and tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qtool.storage.checkpoint import DTYPES


@dataclass(frozen=True)
class Raw:
    """A tensor's type, and its bits in its shape."""

    dtype: str
    data: np.ndarray

    def holding(self, data: np.ndarray) -> Raw:
        """The same type with other bits."""
        return replace(self, data=np.asarray(data, order="C"))


def weights(folder: Path, change) -> None:
    """Let `change(dict)` alter the tensors of each weight file in `folder`."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_weights(path)
        change(tensors)
        write_weights(path, tensors)


def read_weights(path: Path) -> dict[str, Raw]:
    """The tensors of one file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[first:last], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = Raw(entry["dtype"], values.copy())
    return tensors


def write_weights(path: Path, tensors: dict[str, Raw]) -> None:
    """One file of `tensors`."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, raw in tensors.items():
        end = position + raw.data.nbytes
        header[name] = {"dtype": raw.dtype, "shape": list(raw.data.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(raw.data.tobytes() for raw in tensors.values()))


def read_json(path: Path):
    """What a JSON file says."""
    return json.loads(path.read_text())


def edit(path: Path, change) -> None:
    """Let `change(value)` alter a JSON file."""
    value = read_json(path)
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False))


def config(folder: Path, change) -> None:
    """Let `change(dict)` alter config.json."""
    edit(folder / "config.json", change)


def gguf(folder: Path, *, fields=None, tensors=None, name: str = "model.gguf") -> None:
    """Let `fields(dict)` and `tensors(dict)` alter a GGUF file."""
    from tests.checks.rewriting import rewrite_gguf

    rewrite_gguf(folder / name, fields, tensors)


def field(folder: Path, key: str, make, name: str = "model.gguf") -> None:
    """Replace the value of a GGUF field by `make(old)`."""

    def change(fields) -> None:
        fields[key] = replace(fields[key], data=make(fields[key].data))

    gguf(folder, fields=change, name=name)


def exchange(tensors, first: str, second: str) -> None:
    """Let two tensors, each with its scales, change places."""
    for name in [name for name in tensors if name.startswith(first.removesuffix("weight"))]:
        other = second.removesuffix("weight") + name.removeprefix(first.removesuffix("weight"))
        tensors[name], tensors[other] = _moved(tensors, other, name), _moved(tensors, name, other)


def copy(tensors, source: str, target: str) -> None:
    """Put all tensors whose names begin with `source` in the place of those that begin with `target`."""
    for name in [name for name in tensors if name.startswith(source)]:
        place = target + name.removeprefix(source)
        tensors[place] = _moved(tensors, name, place)


def _moved(tensors, source: str, target: str):
    """The bits of one tensor for the place of another, which keeps its own name."""
    if isinstance(tensors[source], Raw):
        return tensors[source]
    return replace(tensors[target], data=tensors[source].data)
