"""The tensors of a GGUF model and of its projector against those that its own fields promise."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, prod
from typing import Any, Final

from qtool.arch.families import SEEN_IN
from qtool.arch.family import Family
from qtool.arch.gguf_names import FUSED_GROUPS, FUSED_QKV
from qtool.arch.prompts import ANSWERS
from qtool.arch.spec import Task
from qtool.artefact import ProjectorCandidate, projector_type
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.gguf_language import LanguageModel
from qtool.checks.report import ClassedTensor
from qtool.formats.ggml import F32, GGML_TYPES, NVFP4
from qtool.scoring.llama_cpp.loadable import VISION_SIZES, deepstack_layers, expected_tensors
from qtool.storage.gguf_fields import language_problems, projector_problems
from qtool.storage.gguf_model import OUTPUT, PROJECTOR, RANK_HEAD, TOKEN_EMBEDDING, TOKENS_KEY, GgufModel
from qtool.storage.head_rows import HeadOrder, head_order

# The tensors of a GGUF file against those that its own fields promise. Names and shapes come from the declared
# architecture, as they do for checkpoints; sizes that no file of this many tensors can have are not even listed.

Shape = tuple[int, ...]

_REQUIRED: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_EPSILON: Final = "attention.layer_norm_rms_epsilon"
_MOST: Final = 1 << 16
_SCALE: Final = re.compile(r"(?P<module>blk\.\d+\.(attn_(q|k|v|output|qkv)|ffn_(gate|up|down))|output)\.(input_)?scale")
"""The scales that llama.cpp reads beside a weight (src/llama-model.cpp, load_tensors); it refuses a file with others."""
_SHOWN: Final = 3
"""Problems of one kind that are reported one by one."""


def load_findings(model: LanguageModel) -> Iterator[Finding]:
    """What makes llama.cpp refuse the file, or end the whole process."""
    for problem in list(language_problems(model.file, has_sections=model.family.is_vision))[:_SHOWN]:
        yield model.found("gguf-aborts" if problem.aborts else "gguf-refused", problem=problem.what)


def type_findings(model: LanguageModel) -> Iterator[Finding]:
    """Whether any matrix has the type that the file declares.

    Types of 256 values a block need rows of such lengths; where there is none, llama.cpp falls back to another type.
    """
    declared = re.sub(r"_(S|M|L|XL|XS)$", "", model.file.file_type) if model.file.file_type != "IQ4_XS" else "IQ4_XS"
    kind = next((each for each in GGML_TYPES.values() if each.name == declared), None)
    matrices = [each for each in model.file.tensors.values() if len(each.shape) > 1]
    fits = [each for each in matrices if kind is not None and each.shape[-1] % kind.block == 0]
    if kind is not None and fits and all(each.type is not kind for each in matrices):
        types = Counter(each.type.name for each in fits).most_common(1)
        yield model.found("gguf-file-type", declared=model.file.file_type, found=types[0][0])


def stray_scale_findings(model: LanguageModel) -> Iterator[Finding]:
    """Scales of weights that are not NVFP4: llama.cpp multiplies by them all the same, by one without harm."""
    tensors = model.file.tensors
    scales = [name for name in tensors if name.endswith(".scale") and is_scale(name, tensors)]
    stray = [name for name in scales if tensors[f"{name.removesuffix('.scale')}.weight"].type is not NVFP4]
    values = model.file.read_numbers([name for name in stray if tensors[name].type is F32]) or {}
    stray = [name for name in stray if values.get(name) != 1]
    if stray:
        kind = tensors[f"{stray[0].removesuffix('.scale')}.weight"].type.name
        yield model.found("gguf-stray-scale", tensors=listed(stray), type=kind)


def tensor_findings(model: LanguageModel) -> Iterator[Finding]:
    """What is missing, of another shape, or too much."""
    missing_fields = list(_missing_fields(model))
    if missing_fields:
        yield model.found("gguf-missing-field", field=listed(missing_fields))
        return
    expected = _expected(model)
    found = {name: tensor.shape for name, tensor in model.file.tensors.items()}
    known = [*expected, OUTPUT]
    missing, misshapen = compare(expected, found)
    if missing:
        yield model.found("gguf-missing-tensor", tensors=listed(missing))
    for name in misshapen[:1]:
        yield model.found("gguf-tensor-shape", tensor=name, found=list(found[name]), expected=list(expected[name]))
    unknown = [n for n in found if n not in known and n != RANK_HEAD and not is_scale(n, found)]
    if unknown:
        yield model.found("gguf-unknown-tensor", tensors=listed(unknown))


def _missing_fields(model: LanguageModel) -> Iterator[str]:
    for field in _REQUIRED:
        if (model.integer(field) or 0) < 1:
            yield model.file.key(field)
    if model.file.number(model.file.key(_EPSILON)) is None:
        yield model.file.key(_EPSILON)
    if model.head_dim < 1:
        yield model.file.key("attention.key_length")


def compare(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> tuple[list[str], list[str]]:
    """The names that are missing, and those of another shape."""
    missing = [name for name in expected if name not in found]
    return missing, [name for name, shape in expected.items() if name in found and found[name] != shape]


def classed_tensors(file: GgufModel) -> Iterator[ClassedTensor]:
    """The tensors for the table of classes."""
    names = file.tensors
    for name, tensor in names.items():
        beside = is_scale(name, names)
        yield ClassedTensor(
            name, None if beside else tensor.type.name, 0 if beside else prod(tensor.shape), tensor.nbytes
        )


def is_scale(name: str, names: Mapping[str, object]) -> bool:
    """Whether a tensor is a scale that llama.cpp reads beside one of the weights among `names`."""
    found = _SCALE.fullmatch(name)
    return found is not None and f"{found['module']}.weight" in names


def _expected(model: LanguageModel) -> dict[str, Shape]:
    tokens = len(model.file.texts(TOKENS_KEY))
    embedding = model.file.tensors.get(TOKEN_EMBEDDING)
    heads = model.integer("attention.head_count") or 0
    layers = min(model.integer("block_count") or 0, len(model.file.tensors) + 1, _MOST)
    config = {
        **{hf_field: model.integer(field) for field, hf_field in _REQUIRED.items()},
        "num_hidden_layers": layers,
        "num_key_value_heads": max(model.integer("attention.head_count_kv") or heads, 1),
        "head_dim": model.head_dim,
        "attention_bias": "blk.0.attn_q.bias" in model.file.tensors,
        "vocab_size": tokens or (embedding.shape[0] if embedding else 1),
    }
    names = model.family.gguf_names
    expected = {str(names.of(spec.hf_name)): spec.shape for spec in model.family.decoder(config, "model.")}
    for layer in range(layers):
        if f"blk.{layer}.{FUSED_QKV}.weight" in model.file.tensors:
            parts = [expected.pop(f"blk.{layer}.{part}.weight") for part in FUSED_GROUPS[0]]
            expected[f"blk.{layer}.{FUSED_QKV}.weight"] = (sum(rows for rows, _ in parts), parts[0][1])
    return expected


# The rows of a rank head beside the vocabulary's rows of yes and no in the same model: only of a model on this disk, and
# four rows of it.


def head_findings(model: LanguageModel) -> Iterator[Finding]:
    """Whether the first row of a reranker's head is yes."""
    if model.task is not Task.RERANK or not model.file.location.is_local:
        return
    if head_order(model.file, ANSWERS) is HeadOrder.EXCHANGED:
        yield model.found("gguf-head-exchanged")


# The global scales of NVFP4 tensors in a GGUF file. llama.cpp multiplies each product by its own scale and takes 1
# where there is none, so a missing one is silent and an unequal one harmless there.


def scale_findings(model: LanguageModel) -> Iterator[Finding]:
    """Whether each NVFP4 tensor has its global scale, whether that is a number to scale with, and whether it is used."""
    file, scales = model.file, model.file.nvfp4_scales
    present = [name for name in scales if name in file.tensors]
    missing = [name for name in scales if name not in file.tensors]
    if scales and not present:
        yield model.found("nvfp4-no-scales")
        return
    if missing:
        yield model.found("nvfp4-missing-scale", tensors=listed_are(missing))
    if model.family.scales_ignored_among(present):
        facts = {"architecture": model.family.gguf_architecture, "build": SEEN_IN}
        yield model.found("nvfp4-scales-ignored", **facts)
    values = file.read_numbers([name for name in present if file.tensors[name].type is F32])
    if values is None:
        yield model.found("nvfp4-scales-unread")
        return
    bad = [name for name, value in values.items() if not isfinite(value) or value <= 0]
    for name in bad[:1]:
        yield model.found("nvfp4-bad-scale", tensor=name, value=values[name])
    for group in () if bad else list(_unequal_groups(values))[:1]:
        yield model.found("nvfp4-unequal-source", group=group)


def _unequal_groups(values: Mapping[str, float]) -> Iterator[str]:
    for block in dict.fromkeys(name.rpartition(".attn_q.")[0] or name.rpartition(".ffn_gate.")[0] for name in values):
        for members in FUSED_GROUPS:
            found = {values[name] for member in members if (name := f"{block}.{member}.scale") in values}
            if len(found) > 1:
                yield f"{block}.{' and '.join(members)}"


# The vision projector of a GGUF pair, by itself and beside its language model.

_VISION: Final = f"{PROJECTOR}.vision."
_STATISTICS: Final = ("image_mean", "image_std")
_TAKEN: Final = re.compile(r"v\.(pre_ln|blk\.\d+\.ffn_gate)\.(weight|bias)")
"""What llama.cpp computes with where a projector holds it, and no model of the family has."""


@dataclass(frozen=True)
class Projector:
    """A GGUF file with the vision tower of a family."""

    file: GgufModel
    family: Family

    @cached_property
    def deepstack_layers(self) -> list[int]:
        """The vision layers that have a deepstack merger."""
        return deepstack_layers(self.file)

    def integer(self, name: str) -> int | None:
        """A whole number among the vision fields."""
        return self.file.integer(_VISION + name)

    def found(self, code: str, **facts: Any) -> Finding:
        """A finding about this file."""
        return finding(code, self.file.target, projector=self.file.name, **facts)


def projector_findings(projector: Projector) -> Iterator[Finding]:
    """What is wrong with the projector by itself."""
    for problem in list(projector_problems(projector.file))[:_SHOWN]:
        yield projector.found("gguf-aborts" if problem.aborts else "gguf-refused", problem=problem.what)
    taken = [name for name in projector.file.tensors if _TAKEN.fullmatch(name)]
    if taken:
        yield projector.found("mmproj-taken-tensor", tensors=listed(taken))
    missing = list(_missing_projector_fields(projector))
    if missing:
        yield projector.found("mmproj-missing-field", field=listed(missing))
        return
    flags = projector.file.flags(f"{_VISION}is_deepstack_layers")
    flagged = [layer for layer, flag in enumerate(flags) if flag]
    if flagged != projector.deepstack_layers:
        yield projector.found("mmproj-deepstack-flags", flagged=flagged, found=projector.deepstack_layers)
    expected = expected_tensors(projector.file, projector.family)
    found = {name: tensor.shape for name, tensor in projector.file.tensors.items()}
    absent, misshapen = compare(expected, found)
    if absent:
        yield projector.found("mmproj-missing-tensor", tensors=listed(absent))
    for name in misshapen[:1]:
        facts = {"found": list(found[name]), "expected": list(expected[name])}
        yield projector.found("mmproj-tensor-shape", tensor=name, **facts)


def _missing_projector_fields(projector: Projector) -> Iterator[str]:
    for field in (*VISION_SIZES, "image_size"):
        if (projector.integer(field) or 0) < 1:
            yield _VISION + field
    for field in _STATISTICS:
        if len(projector.file.floats(_VISION + field)) != 3:
            yield _VISION + field
    if not projector.file.flag("clip.has_vision_encoder"):
        yield "clip.has_vision_encoder"


def pair_findings(
    model: LanguageModel, fitting: Sequence[GgufModel], candidates: Sequence[ProjectorCandidate]
) -> Iterator[Finding]:
    """Whether any of the `candidates` fits the model, and if not why; a text model needs none."""
    if model.family.vision is None or fitting:
        return
    if not candidates:
        yield model.found("mmproj-missing")
    for candidate in candidates:
        if candidate.file is None:
            yield model.found("mmproj-unreadable", projector=candidate.name, problem=candidate.problem)
        else:
            yield from _misfit_findings(model, candidate.file, model.family.vision.projector_type)


def _misfit_findings(model: LanguageModel, projector: GgufModel, expected: str) -> Iterator[Finding]:
    found = projector_type(projector)
    if found != expected:
        yield model.found("mmproj-type", projector=projector.name, found=found, expected=expected)
        return
    theirs, width = Projector(projector, model.family), model.integer("embedding_length")
    layers, count = model.integer("n_deepstack_layers") or 0, len(theirs.deepstack_layers)
    given = theirs.integer("projection_dim")
    if given != width:
        yield model.found("mmproj-width", projector=projector.name, found=given or "unknown width", expected=width)
    if count != layers:
        yield model.found("mmproj-deepstack", projector=projector.name, found=count, expected=layers)


def projector_markers(projector: Projector) -> Iterator[tuple[str, str]]:
    """The projector as a person reads it."""
    yield "projector type", projector_type(projector.file)
    yield "width", str(projector.integer("projection_dim") or "missing")
    yield "deepstack", ", ".join(map(str, projector.deepstack_layers)) or "none"
