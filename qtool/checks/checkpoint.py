"""A safetensors checkpoint by itself: what it is and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any, Final

from qtool.arch.families import architectures
from qtool.arch.prompts import ANSWERS, rerank_template
from qtool.arch.spec import Presence, Task
from qtool.artefact import CheckpointArtefact
from qtool.checks.checkpoint_model import TOKENIZER, CheckpointModel, as_mapping
from qtool.checks.checkpoint_quantization import (
    cache_scales,
    declared,
    excluded,
    foreign_quantization,
    is_declared,
    quantization_findings,
)
from qtool.checks.checkpoint_sources import field_findings, source_findings
from qtool.checks.comparable import template_text
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.report import ClassedTensor, InspectedArtefact, tensor_classes
from qtool.formats.floats import FLOAT_FORMATS
from qtool.jsonfile import read_json
from qtool.progress import StageProgress
from qtool.storage.checkpoint import INDEX, SINGLE, Checkpoint
from qtool.storage.hub import Source
from qtool.storage.location import ArtefactLocation

# The files beside a checkpoint's weights, and what breaks without each. Presence is judged by name, contents only
# where they decide how the model pools.


_CHAT_TEMPLATE: Final = "chat_template.jinja"
_MODULES: Final = "modules.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_SENTENCE_TRANSFORMERS: Final = {
    "config_sentence_transformers.json": "the task and its prompts",
    "sentence_bert_config.json": "how to read pictures",
}


def side_file_findings(model: CheckpointModel) -> Iterator[Finding]:
    """Every file that is missing and missed."""
    if TOKENIZER not in model.names and not {"vocab.json", "merges.txt"} <= set(model.names):
        yield model.found("safetensors-missing-tokenizer", name=TOKENIZER)
    if _TOKENIZER_CONFIG not in model.names:
        yield model.found("safetensors-missing-tokenizer-config", name=_TOKENIZER_CONFIG)
    if _needs_chat_template(model) and not _has_chat_template(model):
        yield model.found("safetensors-missing-chat-template", name=_CHAT_TEMPLATE)
    if model.family.is_vision and not {"preprocessor_config.json", "processor_config.json"} & set(model.names):
        yield model.found("safetensors-missing-preprocessor", name="preprocessor_config.json")
    if _MODULES in model.names:
        yield from _module_findings(model)
    else:
        yield model.found("safetensors-missing-modules-json", name=_MODULES)


def chat_template(model: CheckpointModel) -> str:
    """Whose the chat template is, for people: vLLM renders a reranker's prompt with it."""
    official = rerank_template(model.family.reranker)
    path = model.checkpoint.directory / _CHAT_TEMPLATE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if template_text(text) == template_text(official):
        return "official"
    return "present" if _has_chat_template(model) else "missing"


def _has_chat_template(model: CheckpointModel) -> bool:
    if any(name.startswith(("chat_template.", "additional_chat_templates/")) for name in model.names):
        return True
    return "chat_template" in _read(model, _TOKENIZER_CONFIG)


def _needs_chat_template(model: CheckpointModel) -> bool:
    """Only an embedder of texts has a prompt that is plain text."""
    return model.family.is_vision or model.detection.task is not Task.EMBED


def _read(model: CheckpointModel, name: str) -> Mapping[str, Any]:
    return read_json(model.checkpoint.directory / name) if name in model.names else {}


def _module_findings(model: CheckpointModel) -> Iterator[Finding]:
    for name, purpose in _SENTENCE_TRANSFORMERS.items():
        is_needed = name != "sentence_bert_config.json" or model.family.is_vision
        if is_needed and name not in model.names:
            yield model.found("safetensors-missing-sentence-transformers-config", name=name, purpose=purpose)
    for module in map(as_mapping, read_json(model.checkpoint.directory / _MODULES, list)):
        kind, path = (str(module.get(key, "")) for key in ("type", "path"))
        config = f"{path}/config.json"
        if not path or kind.endswith("Normalize"):  # which has nothing to configure
            continue
        if config not in model.names:
            yield model.found("safetensors-missing-module", path=path, name=f"'{path}/*'")
        elif kind.endswith("Pooling"):
            yield from _pooling_findings(model, _read(model, config))


def _pooling_findings(model: CheckpointModel, pooling: Mapping[str, Any]) -> Iterator[Finding]:
    flags = [
        key.removeprefix("pooling_mode_") for key, flag in pooling.items() if key.startswith("pooling_mode_") and flag
    ]
    found = str(pooling.get("pooling_mode") or ", ".join(flags))
    if found != "lasttoken":
        yield model.found("safetensors-pooling", found=found or "nothing", name="1_Pooling/config.json")


# tokenizer.json of a checkpoint, and the ids of the answers that its rank head names. What cannot be looked into is
# not judged.


_HEAD: Final = "LogitScore"


def tokenizer_findings(model: CheckpointModel) -> Iterator[Finding]:
    """Whether text is split as in training and the answers are single tokens, the ones that the head takes."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return
    official = model.family.tokenizer
    if _split_pattern(tokenizer) != official.split_pattern:
        yield model.found("safetensors-pre-tokenizer", name=TOKENIZER, expected=official.gguf_pre)
    if model.detection.task is Task.RERANK:
        yield from _answer_findings(model, tokenizer)


def pre_tokenizer(model: CheckpointModel) -> str:
    """How text is split, for people."""
    if model.tokenizer is None:
        return "not read" if TOKENIZER in model.names else "missing"
    official = model.family.tokenizer
    return official.gguf_pre if _split_pattern(model.tokenizer) == official.split_pattern else "other"


def _split_pattern(tokenizer: Mapping[str, Any]) -> str | None:
    declared = as_mapping(tokenizer.get("pre_tokenizer"))
    several = declared.get("pretokenizers")
    steps = [as_mapping(step) for step in several] if isinstance(several, list) else [declared]
    patterns = [as_mapping(step.get("pattern")).get("Regex") for step in steps if step.get("type") == "Split"]
    return patterns[0] if len(patterns) == 1 else None


def _answer_findings(model: CheckpointModel, tokenizer: Mapping[str, Any]) -> Iterator[Finding]:
    vocabulary = as_mapping(as_mapping(tokenizer.get("model")).get("vocab"))
    missing = [word for word in ANSWERS if word not in vocabulary]
    for word in missing:
        yield model.found("safetensors-no-yes-no-token", word=word, name=TOKENIZER)
    for name in () if missing else model.names:
        if name.endswith(f"_{_HEAD}/config.json"):
            head = read_json(model.checkpoint.directory / name)
            found, expected = (
                [head.get("true_token_id"), head.get("false_token_id")],
                [vocabulary[word] for word in ANSWERS],
            )
            if found != expected:
                yield model.found("safetensors-answer-ids", path=name, found=found, expected=expected, name=name)


# The checkpoint as a whole. An unreadable header or config.json is an error; a readable one of another family is a note.

_KIND: Final = "safetensors"


def inspect_checkpoint(
    location: ArtefactLocation, task: Task | None, progress: StageProgress
) -> Iterator[InspectedArtefact]:
    """The one checkpoint of `location`, or none."""
    if not {SINGLE, INDEX} & set(location.names):
        return
    progress("safetensors headers", 0, 1)
    with location.checkpoint() as folder:
        yield _inspected(CheckpointArtefact(Source(folder, location.path_of("")), task), location)
    progress("safetensors headers", 1, 1)


def checkpoint_findings(artefact: CheckpointArtefact) -> list[Finding]:
    """What is wrong with an opened checkpoint by itself."""
    return list(_inspected(artefact, artefact.location).findings)


def _inspected(artefact: CheckpointArtefact, location: ArtefactLocation) -> InspectedArtefact:
    what = foreign(artefact.checkpoint)
    return _foreign_artefact(artefact.checkpoint, location, what) if what else _artefact(artefact, location)


def foreign(checkpoint: Checkpoint) -> str:
    """What a checkpoint is of which qtool knows nothing; empty if it does."""
    names = checkpoint.config.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else "unnamed"
    if architecture not in architectures():
        return f"a checkpoint of the architecture {architecture}"
    quantization = foreign_quantization(checkpoint)
    return f"a checkpoint quantized by {quantization}" if quantization else ""


def _artefact(artefact: CheckpointArtefact, location: ArtefactLocation) -> InspectedArtefact:
    model, detection = CheckpointModel(artefact, location), artefact.detection
    if wrong := list(field_findings(detection.config, model.target, is_vision=detection.architecture.is_vision)):
        return replace(_foreign_artefact(artefact.checkpoint, location, ""), findings=tuple(wrong))
    is_quantized = bool(model.packed or is_declared(model))
    findings = [
        *(() if detection.task else [model.found("safetensors-task-undeclared")]),
        *_tensor_findings(model),
        *_position_findings(model),
        *(quantization_findings(model) if is_quantized else ()),
        *tokenizer_findings(model),
        *side_file_findings(model),
        *source_findings(model),
    ]
    return InspectedArtefact(
        name=model.target,
        kind=_KIND,
        family=model.positions.model,
        architecture=detection.architecture.name,
        task=detection.task.value if detection.task else "unknown",
        task_source=detection.task_source,
        format=_format(model),
        classes=tensor_classes(model.classed_tensors()),
        markers=dict(_markers(model)),
        findings=tuple(findings),
    )


def _foreign_artefact(checkpoint: Checkpoint, location: ArtefactLocation, what: str) -> InspectedArtefact:
    names = checkpoint.config.get("architectures")
    stored = [ClassedTensor(n, i.dtype, prod(i.shape), i.nbytes) for n, i in checkpoint.tensors.items()]
    target = location.path_of("")
    return InspectedArtefact(
        name=target,
        kind=_KIND,
        family="unknown",
        architecture=str(names[0]) if isinstance(names, list) and names else "unknown",
        format="unknown",
        classes=tensor_classes(stored),
        findings=(finding("safetensors-foreign", target, what=what),),
    )


def _format(model: CheckpointModel) -> str:
    if model.packed:
        return str(declared(model).get("quant_algo", "NVFP4"))
    sizes: Counter[str] = Counter()
    for info in model.checkpoint.tensors.values():
        sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else "empty"


def _tensor_findings(model: CheckpointModel) -> Iterator[Finding]:
    """What is missing, too much, of another type or of another shape than config.json promises: a closed world."""
    missing = [n for n, spec in model.specs.items() if spec.presence is Presence.REQUIRED and n not in model.weights]
    if missing:
        yield model.found("safetensors-missing-tensor", tensors=listed_are(missing), name="'*.safetensors'")
    known = {*model.weights, *model.companions, *map(model.canonical, cache_scales(model))}
    unknown = [name for name in model.checkpoint.tensors if model.canonical(name) not in known]
    if unknown:
        yield model.found("safetensors-unknown-tensor", tensors=listed(unknown))
    named: dict[str, str] = {}
    for name in model.checkpoint.tensors:
        first = named.setdefault(model.canonical(name), name)
        if first != name:
            yield model.found("safetensors-tensor-twice", first=first, second=name)
            break
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
    if names := excluded(model):
        yield "excluded modules", ", ".join(names)
