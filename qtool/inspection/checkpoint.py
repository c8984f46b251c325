"""The safetensors checkpoint of a place: what it is and what is wrong with it.

Rule: an unreadable header or config.json is an error; a readable one of another family is a note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

from qtool.arch.detect import ARCHITECTURES, detect
from qtool.arch.spec import Presence, Task
from qtool.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_checkpoint
from qtool.formats.floats import FLOAT_FORMATS
from qtool.inspection import nvfp4
from qtool.inspection.catalogue import finding, listed, listed_are
from qtool.inspection.checkpoint_model import CheckpointModel
from qtool.inspection.classes import StoredTensor, tensor_classes
from qtool.inspection.finding import Finding
from qtool.inspection.place import Place
from qtool.inspection.report import Artefact
from qtool.inspection.side_files import chat_template, side_file_findings
from qtool.inspection.tokenizer_file import pre_tokenizer, tokenizer_findings
from qtool.progress import StageProgress

_KIND: Final = "safetensors"


def checkpoint_artefacts(place: Place, task: Task | None, progress: StageProgress) -> Iterator[Artefact]:
    """The one checkpoint of `place`, or none."""
    if not {SINGLE, INDEX} & set(place.names):
        return
    progress("safetensors headers", 0, 1)
    with place.checkpoint() as folder:
        checkpoint = open_checkpoint(folder)
        what = _foreign(checkpoint.config)
        if what:
            yield _foreign_artefact(place, checkpoint, what)
        else:
            yield _artefact(place, checkpoint, folder, task)
    progress("safetensors headers", 1, 1)


def _foreign(config: Mapping[str, Any]) -> str:
    """What a checkpoint is of which qtool knows nothing; empty if it does."""
    names = config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else "unnamed"
    if architecture not in ARCHITECTURES:
        return f"a checkpoint of the architecture {architecture}"
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return ""
    method, algorithm = quantization.get("quant_method"), quantization.get("quant_algo")
    if method == nvfp4.METHOD and algorithm in nvfp4.ALGORITHMS:
        return ""
    return f"a checkpoint quantized by {method}" + (f" ({algorithm})" if algorithm else "")


def _artefact(place: Place, checkpoint: Checkpoint, folder: Path, task: Task | None) -> Artefact:
    detection = detect(folder, task)
    model = CheckpointModel(checkpoint, detection, place.path_of(""), place.names)
    is_quantized = bool(model.packed or nvfp4.declared(model) or nvfp4.HF_QUANT_CONFIG in place.names)
    findings = [
        *(() if detection.task else [model.found("safetensors-task-undeclared")]),
        *_tensor_findings(model),
        *_position_findings(model),
        *(nvfp4.quantization_findings(place, model) if is_quantized else ()),
        *tokenizer_findings(model),
        *side_file_findings(model),
    ]
    return Artefact(
        place.path_of(""), _KIND, f"{model.family.name} {model.positions.size}".rstrip(), detection.architecture.name,
        detection.task.value if detection.task else "unknown", detection.task_source, _format(model),
        tensor_classes(model.stored_tensors()), dict(_markers(model)), tuple(findings),
    )  # fmt: skip


def _foreign_artefact(place: Place, checkpoint: Checkpoint, what: str) -> Artefact:
    names = checkpoint.config.get("architectures")
    stored = [StoredTensor(n, i.dtype, prod(i.shape), i.nbytes) for n, i in checkpoint.tensors.items()]
    found = finding("safetensors-foreign", place.path_of(""), what=what)
    return Artefact(
        place.path_of(""), _KIND, "unknown", str(names[0]) if isinstance(names, list) and names else "unknown", "", "",
        "unknown", tensor_classes(stored), {}, (found,),
    )  # fmt: skip


def _format(model: CheckpointModel) -> str:
    if model.packed:
        return str(nvfp4.declared(model).get("quant_algo", "NVFP4"))
    sizes: Counter[str] = Counter()
    for info in model.checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "empty"


def _tensor_findings(model: CheckpointModel) -> Iterator[Finding]:
    """What is missing, too much, of another type or of another shape than config.json promises: a closed world."""
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
    misshapen = [name for name, info in model.weights.items() if info.shape != _stored_shape(model, name)]
    for name in misshapen[:1]:
        info, expected = model.weights[name], list(_stored_shape(model, name))
        yield model.found("safetensors-tensor-shape", tensor=info.hf_name, found=list(info.shape), expected=expected)


def _stored_shape(model: CheckpointModel, hf_name: str) -> tuple[int, ...]:
    """The shape that a weight must have: packed, two values share a byte."""
    shape = model.specs[hf_name].shape
    return (*shape[:-1], shape[-1] // 2) if hf_name in model.packed else shape


def _position_findings(model: CheckpointModel) -> Iterator[Finding]:
    for problem in model.positions.rope_problems():
        yield model.found("safetensors-rope", problem=problem, name="config.json")
    for problem in model.positions.deepstack_problems():
        yield model.found("safetensors-deepstack", problem=problem, name="config.json")


def _markers(model: CheckpointModel) -> Iterator[tuple[str, str]]:
    yield "head", model.detection.architecture.head
    yield "chat template", chat_template(model)
    yield "pre-tokenizer", pre_tokenizer(model)
    yield from model.positions.markers()
    excluded = nvfp4.excluded(model)
    if excluded:
        yield "excluded modules", ", ".join(excluded)
