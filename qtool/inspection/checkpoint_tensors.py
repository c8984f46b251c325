"""The tensors of a safetensors checkpoint against those that its config.json promises.

Rule: closed world, as in a quantization's plan: missing, misshapen and unknown tensors are all named.
"""

from __future__ import annotations

from collections.abc import Iterator

from qtool.arch.spec import Presence
from qtool.formats.floats import FLOAT_FORMATS
from qtool.inspection.catalogue import listed, listed_are
from qtool.inspection.checkpoint_model import CheckpointModel
from qtool.inspection.finding import Finding


def tensor_findings(model: CheckpointModel) -> Iterator[Finding]:
    """What is missing, too much, of another type or of another shape."""
    missing = [n for n, spec in model.specs.items() if spec.presence is Presence.REQUIRED and n not in model.weights]
    if missing:
        yield model.found("safetensors-missing-tensor", tensors=listed_are(missing), name="'*.safetensors'")
    known = {*model.weights, *model.companions}
    unknown = [name for name in model.checkpoint.tensors if model.canonical(name) not in known]
    if unknown:
        yield model.found("safetensors-unknown-tensor", tensors=listed(unknown))
    wrong = [n for n, info in model.weights.items() if n not in model.packed and info.dtype not in FLOAT_FORMATS]
    for name in wrong[:1]:
        info = model.weights[name]
        yield model.found("safetensors-tensor-type", tensor=info.hf_name, found=info.dtype)
    misshapen = [name for name, info in model.weights.items() if info.shape != stored_shape(model, name)]
    for name in misshapen[:1]:
        info, expected = model.weights[name], list(stored_shape(model, name))
        yield model.found("safetensors-tensor-shape", tensor=info.hf_name, found=list(info.shape), expected=expected)


def stored_shape(model: CheckpointModel, hf_name: str) -> tuple[int, ...]:
    """The shape that a weight must have: packed, two values share a byte."""
    shape = model.specs[hf_name].shape
    return (*shape[:-1], shape[-1] // 2) if hf_name in model.packed else shape
