"""Lays out safetensors shards, to the byte, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from qtool.jsonfile import json_bytes
from qtool.storage.checkpoint import DTYPES, SINGLE
from qtool.storage.output_files import FileLayout

_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written."""

    hf_name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ShardLayout:
    """All output files of a checkpoint."""

    shards: tuple[FileLayout, ...]
    index: bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.nbytes for shard in self.shards)


def lay_out(tensors: Iterable[OutputTensor], max_shard_bytes: int) -> ShardLayout:
    """Distribute `tensors`, in order, over shards of at most `max_shard_bytes` of data (a larger tensor has its own).

    The shards are about even, since they are downloaded and hashed side by side.
    """
    ordered = list(tensors)
    groups = _divided(ordered, max_shard_bytes, _even_share(ordered, max_shard_bytes))
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    )
    shards = tuple(_shard(name, group) for name, group in zip(names, groups, strict=True))
    return ShardLayout(shards, b"" if len(shards) == 1 else _index(shards, groups))


def _even_share(tensors: list[OutputTensor], max_shard_bytes: int) -> int:
    total = sum(tensor.nbytes for tensor in tensors)
    return -(-total // -(-total // max_shard_bytes)) if total else 0


def _divided(tensors: list[OutputTensor], max_bytes: int, share: int) -> list[list[OutputTensor]]:
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and (filled >= share or filled + tensor.nbytes > max_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def _ordered(tensors: list[OutputTensor]) -> list[OutputTensor]:
    """The wider types first, so that every tensor is aligned to its own width: safetensors allows no gaps.

    Global scales, single numbers, lie behind all else where that leaves them aligned.
    """
    ordered = sorted(tensors, key=_width, reverse=True)
    scalars_last = sorted(ordered, key=lambda tensor: tensor.shape == ())
    starts = accumulate((tensor.nbytes for tensor in scalars_last), initial=0)
    is_aligned = all(start % _width(tensor) == 0 for start, tensor in zip(starts, scalars_last, strict=False))
    return scalars_last if is_aligned else ordered


def _width(tensor: OutputTensor) -> int:
    return DTYPES[tensor.dtype].itemsize


def _shard(file_name: str, tensors: list[OutputTensor]) -> FileLayout:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, tuple[int, int]] = {}
    position = 0
    for tensor in _ordered(tensors):
        relative[tensor.hf_name] = position, tensor.nbytes
        span = [position, position + tensor.nbytes]
        entries[tensor.hf_name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    ranges = {name: (len(header) + start, nbytes) for name, (start, nbytes) in relative.items()}
    return FileLayout(file_name, header, ranges, len(header) + position)


def _index(shards: tuple[FileLayout, ...], groups: list[list[OutputTensor]]) -> bytes:
    total = sum(tensor.nbytes for group in groups for tensor in group)
    weight_map = {t.hf_name: shard.file_name for shard, group in zip(shards, groups, strict=True) for t in group}
    return json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
