"""Which tensor of a checkpoint is which tensor of its architecture.

Rule: the world is closed. A tensor that the architecture does not have, one that it must have and that is missing, and
one of another shape than config.json makes it are errors that name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qtool.arch.spec import Architecture, Config, Presence, TensorSpec
from qtool.checkpoint.reader import TensorInfo
from qtool.errors import ModelError


def named_tensors(
    sources: Iterable[TensorInfo], architecture: Architecture, config: Config
) -> dict[TensorSpec, TensorInfo]:
    """The architecture's tensors that are there, in the order of `sources`; shapes are not looked at."""
    specs = {spec.hf_name: spec for spec in architecture.tensors(config)}
    found = _canonical(sources, specs, architecture)
    missing = [s.hf_name for s in specs.values() if s.presence is Presence.REQUIRED and s.hf_name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"The checkpoint lacks {missing[0]}{more}, which {architecture.name} with this config.json has."
        )
    return {specs[hf_name]: source for hf_name, source in found.items()}


def require_shape(spec: TensorSpec, source: TensorInfo) -> None:
    """Raise ModelError unless the tensor has the shape that config.json makes it."""
    if source.shape != spec.shape:
        raise ModelError(f"{source.hf_name} has shape {list(source.shape)}; config.json makes it {list(spec.shape)}.")


def _canonical(
    sources: Iterable[TensorInfo], specs: Mapping[str, TensorSpec], architecture: Architecture
) -> dict[str, TensorInfo]:
    """Sources by canonical name: base-model checkpoints leave the prefix out, as Qwen3-Embedding does."""
    found: dict[str, TensorInfo] = {}
    for source in sources:
        names = [n for n in (source.hf_name, architecture.prefix + source.hf_name) if n in specs]
        if not names:
            raise ModelError(
                f"{source.hf_name} {list(source.shape)} is no tensor of {architecture.name} with this config.json.",
                "qtool touches nothing that it does not know in full.",
            )
        if names[0] in found:
            raise ModelError(f"{source.hf_name} and {found[names[0]].hf_name} are the same tensor.")
        found[names[0]] = source
    return found
