"""A GGUF file against what converting the reference would write: fields, tokens, prompt, names, shapes, protected types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gguf.constants import TokenType

from qtool.arch.gguf_names import FUSED_GROUPS, FUSED_QKV
from qtool.arch.prompts import PromptSpec
from qtool.arch.spec import Task
from qtool.artefact import manifests_of
from qtool.checks.findings import Finding, finding, listed, listed_are
from qtool.checks.gguf_tensors import is_scale
from qtool.checks.reference import Planned, Reference
from qtool.checks.structure_tokenizer import vocabulary_problem
from qtool.export.gguf_metadata import DEFAULT_KEY, NAMES_KEY
from qtool.formats.ggml import FLOAT_TYPES
from qtool.jsonfile import parse_json
from qtool.storage.gguf import Value
from qtool.storage.gguf_fields import DECODER, PROJECTOR_FIELDS, TOKENIZER, value_of
from qtool.storage.gguf_model import OUTPUT, PROJECTOR, RERANK_KEY, TOKEN_EMBEDDING, GgufModel

_TOKENIZER: Final = "tokenizer.ggml."


def language_findings(side: GgufModel, reference: Reference) -> Iterator[Finding]:
    """Everything in which the language model is not what converting the reference gives.

    A field that no score depends on (names, licences, sampling) is not compared; what upstream's converter writes passes.
    """
    planned, architecture = reference.language, reference.family.gguf_architecture
    if side.architecture != architecture:
        yield finding("other-architecture", side.path, found=str(side.architecture), expected=architecture)
        return
    yield from _decoder_findings(side, planned)
    yield from _token_findings(side, planned)
    yield from _template_findings(side, planned)
    if reference.detection.task is Task.RERANK:
        yield from _prompt_findings(side, reference.family.reranker)
    yield from _tensor_findings(side, planned)


def projector_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    """Likewise of the vision projector."""
    yield from _vision_findings(side, planned)
    yield from _tensor_findings(side, planned)


# What llama.cpp computes with: each field that it reads, or its default, beside what the reference needs.

_JUDGED_ALONE: Final = ("pooling_type", "classifier.output_labels", "rope.scaling.type")
"""What the inspection has judged without the reference, or what stands in `_computed` under another name."""
_UNUSED: Final = ("rope.scaling.alpha", "rope.scaling.finetuned", "rope.scaling.original_context_length")
"""Read, and without effect on models of these architectures whose positions are not scaled."""
_STATISTICS: Final = ("clip.vision.image_mean", "clip.vision.image_std")
_CODES: Final = (
    ("rope.", "other-rope"),
    ("attention.layer_norm", "other-epsilon"),
    ("n_deepstack", "other-deepstack"),
    ("is_deepstack", "other-deepstack"),
    ("context_length", "other-length"),
    ("attention.causal", "other-config"),
    ("classifier.", "other-config"),
    ("clip.use_", "other-config"),
)
"""The code of a field by how its key begins; all others are sizes."""


def _decoder_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    mine, theirs = _computed(side, side.metadata), _computed(side, planned.metadata)
    yield from _differences(side.path, mine, theirs)
    unread = [key for key in side.metadata if key.startswith(f"{side.architecture}.") and not _is_read(side, key)]
    unread += [
        key for key in side.metadata if key.startswith(_TOKENIZER) and key not in {*TOKENIZER, *planned.metadata}
    ]
    unread = [key for key in unread if key != f"{_TOKENIZER}scores"]
    if unread:
        yield finding("unread-field", side.path, fields=listed_are(unread))


def _is_read(side: GgufModel, key: str) -> bool:
    return key.removeprefix(f"{side.architecture}.") in DECODER


def _computed(side: GgufModel, metadata: Mapping[str, Value]) -> dict[str, Any]:
    """The decoder's fields as llama.cpp computes with them, by their keys without the architecture."""
    skipped = (*_JUDGED_ALONE, *_UNUSED)
    facts = {name: value_of(metadata, side.key(name), field) for name, field in DECODER.items() if name not in skipped}
    kind = value_of(metadata, side.key("rope.scaling.type"), DECODER["rope.scaling.type"])
    factor = facts.pop("rope.scaling.factor") or facts.pop("rope.scale_linear", 0) or 1
    facts.pop("rope.scale_linear", None)
    facts["rope.scaling"] = "none" if kind == "none" or factor == 1 else f"{kind} by {factor:g}"
    heads, width = facts["attention.head_count"], facts["embedding_length"]
    head_dim = width // heads if isinstance(heads, int) and isinstance(width, int) and heads > 0 else None
    for name, default in (
        ("attention.head_count_kv", heads),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("embedding_length_out", width),
    ):
        facts[name] = facts[name] or default
    facts["rope.dimension_count"] = facts["rope.dimension_count"] or facts["attention.key_length"]
    facts["classifier.pooling_type"] = facts["classifier.pooling_type"] == 1  # only MEAN does something else
    sections = facts["rope.dimension_sections"]
    facts["rope.dimension_sections"] = 4 * [sections] if isinstance(sections, int) else sections
    return facts


def _vision_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    for key in _STATISTICS:
        found, expected = (_data(metadata, key) for metadata in (side.metadata, planned.metadata))
        if not isinstance(found, list) or found[:3] != expected[:3]:  # llama.cpp reads no more
            yield finding("other-side-file", side.path, name=key, effect="pictures are normalized with it")
    prefix = f"{PROJECTOR}.vision."
    ignored = ("general.name", "general.description", "clip.projector_type", "clip.minicpmv_version", *_STATISTICS)
    read = {key: field for key, field in PROJECTOR_FIELDS.items() if key not in ignored and field.is_array is False}
    mine, theirs = ({k: value_of(m, k, f) for k, f in read.items()} for m in (side.metadata, planned.metadata))
    flags = f"{prefix}is_deepstack_layers"
    mine[flags], theirs[flags] = _data(side.metadata, flags), _data(planned.metadata, flags)
    optional = {key for key, value in theirs.items() if value is None}  # no effect, or a default that the sizes give
    yield from _differences(side.path, mine, {key: value for key, value in theirs.items() if key not in optional})
    unread = [
        key for key in side.metadata if key.startswith("clip.") and key not in {*PROJECTOR_FIELDS, *planned.metadata}
    ]
    if unread:
        yield finding("unread-field", side.path, fields=listed_are(unread))


def _differences(path: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in theirs.items():
        if mine.get(key) != value:
            name = key.removeprefix(f"{PROJECTOR}.vision.")
            code = next((code for start, code in _CODES if name.startswith(start)), "other-size")
            yield finding(code, path, field=name, found=_shown(mine.get(key)), expected=_shown(value))


def _shown(value: Any) -> str:
    return "missing" if value is None else f"{value:,g}" if isinstance(value, float) else str(value)


def _data(metadata: Mapping[str, Value], key: str) -> Any:
    """A list's elements, or a single value; nothing where there is neither."""
    return metadata[key].data if key in metadata else None


# The tokenizer: what llama.cpp would make of a text with it.

_LISTS: Final = ("tokens", "token_type", "merges")
_PARSED: Final = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
"""Found in a text before it is split."""


def _token_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    tokens, kinds = (planned.metadata[f"{_TOKENIZER}{part}"].data for part in _LISTS[:2])
    mine, types = side.texts(f"{_TOKENIZER}tokens"), side.integers(f"{_TOKENIZER}token_type")
    used = [place for place, kind in enumerate(kinds) if kind != TokenType.UNUSED]
    plain = [place for place in used if kinds[place] not in _PARSED]
    found = {place: mine[place] for place in used if place < len(mine)}
    problem = vocabulary_problem([found.get(place) for place in plain], [tokens[place] for place in plain])
    merges = planned.metadata[f"{_TOKENIZER}merges"].data
    problem = problem or vocabulary_problem(list(side.texts(f"{_TOKENIZER}merges")), merges)
    if not problem and len(mine) != len(tokens):
        problem = f"it has {len(mine):,} tokens; the reference has {len(tokens):,}"
    added = [place for place in used if kinds[place] in _PARSED]
    lost = [tokens[p] for p in added if (found.get(p), _at(types, p)) != (tokens[p], kinds[p])]
    if problem:
        yield finding("other-tokenizer", side.path, problem=problem)
    elif lost:
        yield finding("added-token-missing", side.path, tokens=listed(lost))
    else:
        yield from _type_findings(side.path, mine, types, kinds)
    yield from _special_findings(side, planned)


def _type_findings(path: Path, tokens: Sequence[str], types: Sequence[int], kinds: Sequence[int]) -> Iterator[Finding]:
    """Tokens that llama.cpp would find in a text before splitting it, and should not, or that have another type."""
    wrong = [
        tokens[place]
        for place, (found, kind) in enumerate(zip(types, kinds, strict=False))
        if found != kind and (kind == TokenType.NORMAL or found in _PARSED)
    ]
    if wrong:
        yield finding("other-token-types", path, tokens=listed_are(wrong))


def _at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def _special_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    flags = {key: field.default for key, field in TOKENIZER.items() if field.default is not None}
    expected = {**flags, **{k: v.data for k, v in planned.metadata.items() if k.startswith(_TOKENIZER)}}
    for key, value in expected.items():
        found = value_of(side.metadata, key, TOKENIZER[key]) if key in TOKENIZER else _data(side.metadata, key)
        if key.removeprefix(_TOKENIZER) not in _LISTS and found != value:
            yield finding("other-special-tokens", side.path, field=key, found=str(found), expected=str(value))


# The prompt, byte for byte: llama.cpp sends every one of them.


def _template_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    for key, value in planned.metadata.items():
        is_template = key.startswith(DEFAULT_KEY) and key not in (RERANK_KEY, NAMES_KEY)
        if is_template and _data(side.metadata, key) != value.data:
            yield finding("other-chat-template", side.path, field=key)


def _prompt_findings(side: GgufModel, official: PromptSpec) -> Iterator[Finding]:
    """Another prompt, or another instruction in it, unless the file's manifest says that it was asked for."""
    template = side.text(RERANK_KEY)
    if template is None or template == _declared_template(side):
        return
    instruction = official.instruction_in(template)
    expected = official.template.replace("{instruction}", official.default_instruction)
    if instruction is None:
        place = next((i for i, (a, b) in enumerate(zip(template, expected, strict=False)) if a != b), -1)
        place = min(len(template), len(expected)) if place < 0 else place
        shown = [repr(text[place : place + 40]) for text in (template, expected)]
        yield finding("other-baked-prompt", side.path, place=place, found=shown[0], expected=shown[1])
    elif instruction != official.default_instruction:
        yield finding("other-instruction", side.path, instruction=instruction)


def _declared_template(side: GgufModel) -> Any:
    """The prompt in the manifest beside the file; the first of two places that has one counts."""
    for name in manifests_of(next(iter(side.parts))):
        if name in side.location.names:
            with side.location.open(name) as source:
                facts = parse_json(source.read(0, source.size), name)
            prompt = facts.get("prompt")
            return prompt.get("template") if isinstance(prompt, dict) else None
    return None


# Tensors.


def _tensor_findings(side: GgufModel, planned: Planned) -> Iterator[Finding]:
    expected = {tensor.output.gguf_name: tensor.output for tensor in planned.file.tensors}
    merged = fused_parts(side, expected)
    needed = [name for name in expected if name != OUTPUT]  # the head of all words, which no score depends on
    missing = [name for name in needed if name not in side.tensors and name not in merged]
    if missing:
        yield finding("missing-tensor", side.path, tensors=listed_are(missing))
    known = {*expected, *(fused for fused, _ in merged.values())}
    head, embedding = side.tensors.get(OUTPUT), expected.get(TOKEN_EMBEDDING)
    if head is not None and embedding is not None and head.shape == embedding.shape:
        known.add(OUTPUT)
    extra = [name for name in side.tensors if name not in known and not is_scale(name, side.tensors)]
    if extra:
        yield finding("extra-tensor", side.path, tensors=listed(extra))
    present = [(side.tensors[name], output) for name, output in expected.items() if name in side.tensors]
    for tensor, output in present:
        if tensor.shape != output.shape:
            facts = {"found": list(tensor.shape), "expected": list(output.shape)}
            yield finding("other-shape", side.path, tensor=output.gguf_name, **facts)
            break
    for tensor, output in present:
        if output.type in FLOAT_TYPES and tensor.type not in FLOAT_TYPES:
            yield finding("protected-type", side.path, tensor=output.gguf_name, found=tensor.type.name)
            break


def fused_parts(side: GgufModel, expected: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """Of each expected q, k and v that the file stores merged: the name of that tensor, and the first row in it."""
    found: dict[str, tuple[str, int]] = {}
    suffix = f".{FUSED_QKV}.weight"
    for fused in (name for name in side.tensors if name.endswith(suffix) and name not in expected):
        row = 0
        for part in FUSED_GROUPS[0]:
            name = f"{fused.removesuffix(suffix)}.{part}.weight"
            if name not in expected or len(expected[name].shape) != 2:
                break
            found[name] = fused, row
            row += expected[name].shape[0]
    return found
