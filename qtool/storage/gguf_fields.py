"""The fields that llama.cpp reads of a GGUF model, and what makes it refuse a file or end the whole process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gguf.constants import GGUFValueType

from qtool.formats.ggml import F32
from qtool.storage.gguf import Value
from qtool.storage.gguf_model import TOKENS_KEY, GgufModel

# Source: llama.cpp's `llama_model_base::load_hparams`, `llama_vocab::impl::load`, the loaders of its Qwen3 models, and
# `clip_model_loader::load_hparams`. What happens with other values was found by loading such files (build b11549): a
# language model with a field of another type is refused, a projector ends the process (`GGML_ASSERT` in gguf.cpp).

_U16, _U32, _I32 = GGUFValueType.UINT16, GGUFValueType.UINT32, GGUFValueType.INT32
_F32, _FLAG, _TEXT = GGUFValueType.FLOAT32, GGUFValueType.BOOL, GGUFValueType.STRING


@dataclass(frozen=True)
class Field:
    """One field: its type, whether it is a list (None: either), and what llama.cpp takes where it is missing.

    `default` is None where the field is required, or where another field stands in for it.
    """

    kind: GGUFValueType
    is_array: bool | None = False
    default: Any = None

    def fits(self, value: Value) -> bool:
        """Whether llama.cpp takes a value of this type."""
        kinds = (_I32, _U32) if value.is_array and self.kind in (_I32, _U32) else (self.kind,)
        return value.kind in kinds and (self.is_array is None or value.is_array == self.is_array)

    @property
    def type_name(self) -> str:
        """The type as people write it."""
        name = self.kind.name.lower()
        return f"list of {name}" if self.is_array else name


DECODER: Final[Mapping[str, Field]] = {
    "context_length": Field(_U32),
    "embedding_length": Field(_U32),
    "embedding_length_out": Field(_U32),
    "block_count": Field(_U32),
    "nextn_predict_layers": Field(_U32, default=0),
    "feed_forward_length": Field(_U32, None),
    "expert_count": Field(_U32, default=0),
    "expert_used_count": Field(_U32, None, default=0),
    "expert_group_count": Field(_U32, default=0),
    "expert_group_used_count": Field(_U32, default=0),
    "attention.causal": Field(_FLAG, default=True),
    "attention.head_count": Field(_U32, None),
    "attention.head_count_kv": Field(_U32, None),
    "attention.key_length": Field(_U32),
    "attention.value_length": Field(_U32),
    "attention.layer_norm_rms_epsilon": Field(_F32),
    "rope.dimension_count": Field(_U32),
    "rope.freq_base": Field(_F32, default=10000.0),
    "rope.scaling.type": Field(_TEXT, default="linear"),
    "rope.scaling.factor": Field(_F32, default=0.0),
    "rope.scale_linear": Field(_F32, default=0.0),
    "rope.scaling.attn_factor": Field(_F32, default=1.0),
    "rope.scaling.alpha": Field(_F32, default=0.0),
    "rope.scaling.original_context_length": Field(_U32),
    "rope.scaling.finetuned": Field(_FLAG, default=False),
    "rope.dimension_sections": Field(_I32, None),
    "n_deepstack_layers": Field(_U32, default=0),
    "pooling_type": Field(_U32),
    "classifier.pooling_type": Field(_U32),
    "classifier.output_labels": Field(_TEXT, is_array=True),
}
"""Of a language model, by the key without its architecture."""

TOKENIZER: Final[Mapping[str, Field]] = {
    "tokenizer.ggml.model": Field(_TEXT),
    "tokenizer.ggml.pre": Field(_TEXT),
    "tokenizer.ggml.tokens": Field(_TEXT, is_array=True),
    "tokenizer.ggml.merges": Field(_TEXT, is_array=True),
    "tokenizer.ggml.token_type": Field(_I32, is_array=True),
    "tokenizer.ggml.token_type_count": Field(_U32),
    **{
        f"tokenizer.ggml.{name}_token_id": Field(_U32)
        for name in ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "prefix", "suffix",
                     "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
    },
    **{f"tokenizer.ggml.add_{name}_token": Field(_FLAG, default=False) for name in ("bos", "eos", "sep")},
    "tokenizer.ggml.add_space_prefix": Field(_FLAG, default=False),
    "tokenizer.ggml.remove_extra_whitespaces": Field(_FLAG, default=False),
}  # fmt: skip
"""Of its tokenizer."""

GENERAL: Final[Mapping[str, Field]] = {
    "general.name": Field(_TEXT),
    "general.file_type": Field(_U32),
    "split.count": Field(_U16, default=0),
}
"""Of any language model."""

PROJECTOR_FIELDS: Final[Mapping[str, Field]] = {
    "general.name": Field(_TEXT),
    "general.description": Field(_TEXT),
    "clip.projector_type": Field(_TEXT, default=""),
    "clip.has_vision_encoder": Field(_FLAG, default=False),
    "clip.has_audio_encoder": Field(_FLAG, default=False),
    "clip.has_gen_audio_encoder": Field(_FLAG, default=False),
    "clip.use_gelu": Field(_FLAG, default=False),
    "clip.use_silu": Field(_FLAG, default=False),
    "clip.minicpmv_version": Field(_I32),
    "clip.minicpmv_query_num": Field(_U32),
    **{
        f"clip.vision.{name}": Field(_U32)
        for name in ("embedding_length", "feed_forward_length", "block_count", "projection_dim", "image_size",
                     "patch_size", "attention.head_count", "attention.head_count_kv", "attention.head_dim",
                     "n_wa_pattern")
    },
    "clip.vision.spatial_merge_size": Field(_U32, default=2),
    "clip.vision.attention.layer_norm_epsilon": Field(_F32),
    "clip.vision.image_mean": Field(_F32, is_array=True),
    "clip.vision.image_std": Field(_F32, is_array=True),
    "clip.vision.feature_layer": Field(_I32, is_array=True),
    "clip.vision.image_grid_pinpoints": Field(_I32, is_array=True),
    "clip.vision.mm_patch_merge_type": Field(_TEXT),
}  # fmt: skip
"""Of a vision projector, by the whole key."""

_SCALINGS: Final = ("none", "linear", "yarn", "longrope")
_MOST_LAYERS: Final = 512  # LLAMA_MAX_LAYERS
_EXPERTS: Final = ("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count")
_PHI: Final = ("phi-3", "phi3")


@dataclass(frozen=True)
class LoadProblem:
    """Why llama.cpp does not run a file, as a clause; `aborts` if it ends the whole process instead of refusing it."""

    what: str
    aborts: bool = False

    @property
    def effect(self) -> str:
        """What llama.cpp does."""
        return "ends the whole process with" if self.aborts else "refuses to load"


def language_fields(model: GgufModel) -> dict[str, Field]:
    """Every field that llama.cpp reads of this language model, by its whole key."""
    return {**{model.key(name): field for name, field in DECODER.items()}, **TOKENIZER, **GENERAL}


def value_of(metadata: Mapping[str, Value], key: str, field: Field) -> Any:
    """The value that llama.cpp computes with: the default where there is none, one number for a list of equal ones."""
    value = metadata.get(key)
    if value is None or not field.fits(value):
        return field.default
    if field.is_array is None and value.is_array and value.data and len(set(value.data)) == 1:
        return value.data[0]
    return value.data


def language_problems(model: GgufModel, *, has_sections: bool) -> Iterator[LoadProblem]:
    """What keeps llama.cpp from running a language model; `has_sections` if its positions have several dimensions."""
    yield from _type_problems(model, language_fields(model), aborts=False)
    yield from _part_problems(model)
    yield from _decoder_problems(model, has_sections=has_sections)
    yield from _token_problems(model)
    for tensor in model.tensors.values():
        if tensor.type is not F32 and (len(tensor.shape) == 1 or tensor.gguf_name.endswith("_norm.weight")):
            yield LoadProblem(f"{tensor.gguf_name} is stored as {tensor.type.name}, expected F32", aborts=True)
            return


def projector_problems(model: GgufModel) -> Iterator[LoadProblem]:
    """Likewise of a vision projector."""
    yield from _type_problems(model, PROJECTOR_FIELDS, aborts=True)
    if model.flag("clip.use_gelu") and model.flag("clip.use_silu"):
        yield LoadProblem("clip.use_gelu and clip.use_silu are both true")
    for kind in ("audio", "gen_audio"):
        if model.flag(f"clip.has_{kind}_encoder"):
            yield LoadProblem(f"clip.has_{kind}_encoder is true, and the file has none")
    heads, width = model.integer("clip.vision.attention.head_count"), model.integer("clip.vision.embedding_length")
    head_dim = model.integer("clip.vision.attention.head_dim")
    if heads is not None and width is not None and (heads < 1 or width % heads):
        yield LoadProblem(f"clip.vision.attention.head_count is {heads}, which does not divide {width}", aborts=True)
    elif heads and width and head_dim not in (None, 0, width // heads):
        yield LoadProblem(f"clip.vision.attention.head_dim is {head_dim}, expected {width // heads}", aborts=True)
    yield from _vision_problems(model)
    for tensor in model.tensors.values():
        if tensor.type is not F32 and (len(tensor.shape) == 1 or tensor.gguf_name == "v.position_embd.weight"):
            yield LoadProblem(f"{tensor.gguf_name} is stored as {tensor.type.name}, expected F32", aborts=True)
            break
    if any(name.startswith("v.class_embd") for name in model.tensors):
        yield LoadProblem("the file has a class embedding, which the model has not", aborts=True)


def _vision_problems(model: GgufModel) -> Iterator[LoadProblem]:
    merge = model.integer("clip.vision.spatial_merge_size")
    if merge not in (None, 2):
        yield LoadProblem(f"clip.vision.spatial_merge_size is {merge}, expected 2", aborts=merge != 0)
    epsilon = model.number("clip.vision.attention.layer_norm_epsilon")
    if epsilon is not None and not epsilon >= 0:
        yield LoadProblem(f"clip.vision.attention.layer_norm_epsilon is {epsilon}", aborts=True)
    if len(model.integers("clip.vision.image_grid_pinpoints")) % 2:
        yield LoadProblem("clip.vision.image_grid_pinpoints has an odd number of elements")
    layers = model.integer("clip.vision.block_count") or 0
    if any(layer > layers for layer in model.integers("clip.vision.feature_layer")):
        yield LoadProblem("clip.vision.feature_layer names a layer that there is not")


def _type_problems(model: GgufModel, fields: Mapping[str, Field], *, aborts: bool) -> Iterator[LoadProblem]:
    for key, field in fields.items():
        value = model.metadata.get(key)
        if value is not None and not field.fits(value):
            found = f"list of {value.kind.name.lower()}" if value.is_array else value.kind.name.lower()
            yield LoadProblem(f"{key} is a {found}, expected a {field.type_name}", aborts)


def _decoder_problems(model: GgufModel, *, has_sections: bool) -> Iterator[LoadProblem]:
    layers, extra = model.integer(model.key("block_count")), model.integer(model.key("nextn_predict_layers")) or 0
    if layers is not None and not 0 < layers <= _MOST_LAYERS:
        yield LoadProblem(f"{model.key('block_count')} is {layers:,}, expected 1 to {_MOST_LAYERS}", aborts=True)
    if extra:
        yield LoadProblem(f"{model.key('nextn_predict_layers')} is {extra}, expected none", extra > (layers or 0))
    for key in (model.key(name) for name in _EXPERTS):
        if model.integer(key) or any(model.integers(key)):
            yield LoadProblem(f"{key} is given, and the model has no experts", aborts=True)
    if model.integer(model.key("context_length")) == 0:
        yield LoadProblem(f"{model.key('context_length')} is 0", aborts=True)
    width, given = (model.integer(model.key(name)) for name in ("embedding_length", "embedding_length_out"))
    if given not in (None, 0, width):
        yield LoadProblem(f"{model.key('embedding_length_out')} is {given}, expected {width}", aborts=True)
    epsilon = model.number(model.key("attention.layer_norm_rms_epsilon"))
    if epsilon is not None and not epsilon >= 0:
        yield LoadProblem(f"{model.key('attention.layer_norm_rms_epsilon')} is {epsilon}", aborts=True)
    deepstack = model.integer(model.key("n_deepstack_layers")) or 0
    if has_sections and not 0 <= deepstack <= (layers or 0):
        yield LoadProblem(f"{model.key('n_deepstack_layers')} is {deepstack:,} of {layers} layers", aborts=True)
    yield from _position_problems(model, has_sections=has_sections)


def _position_problems(model: GgufModel, *, has_sections: bool) -> Iterator[LoadProblem]:
    scaling = model.text(model.key("rope.scaling.type"))
    if scaling not in (None, *_SCALINGS):
        known = f"{', '.join(_SCALINGS[:-1])} or {_SCALINGS[-1]}"
        yield LoadProblem(f"{model.key('rope.scaling.type')} is {scaling!r}, expected {known}", aborts=True)
    heads = value_of(model.metadata, model.key("attention.head_count"), DECODER["attention.head_count"])
    heads = heads if isinstance(heads, int) and heads > 0 else 1
    width = (model.integer(model.key("embedding_length")) or 0) // heads
    key, value = (model.integer(model.key(f"attention.{name}_length")) for name in ("key", "value"))
    key, value = width if key is None else key, width if value is None else value
    turned = model.integer(model.key("rope.dimension_count"))
    if key != value:
        yield LoadProblem(f"heads have {key} dimensions for keys and {value} for values", aborts=True)
    if turned not in (None, key):
        yield LoadProblem(f"{model.key('rope.dimension_count')} is {turned}, expected {key}", aborts=True)
    if has_sections:
        yield from _section_problems(model, key)


def _section_problems(model: GgufModel, head_dim: int) -> Iterator[LoadProblem]:
    name = model.key("rope.dimension_sections")
    value = model.metadata.get(name)
    if value is None or not DECODER["rope.dimension_sections"].fits(value):
        return  # which the checks of missing fields and of types report
    sections = list(value.data) if value.is_array else 4 * [value.data]
    if len(sections) != 4:
        yield LoadProblem(f"{name} has {len(sections)} elements, expected 4")
    elif not any(each > 0 for each in sections[:3]) or not 0 < sum(sections) <= head_dim:
        yield LoadProblem(f"{name} is {sections}, expected {head_dim // 2} in all", aborts=True)


def _token_problems(model: GgufModel) -> Iterator[LoadProblem]:
    tokens = model.texts(TOKENS_KEY)
    named = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
    repeated = next((token for token, count in Counter(named).items() if count > 1), None)
    if repeated is not None:
        yield LoadProblem(f"the token {repeated!r} is in the vocabulary twice", aborts=True)
    kinds = len(model.integers("tokenizer.ggml.token_type"))
    if 0 < kinds < len(tokens):
        yield LoadProblem(f"there are {len(tokens):,} tokens and {kinds:,} types of tokens")
    scores = model.metadata.get("tokenizer.ggml.scores")
    is_list = scores is not None and scores.is_array and scores.kind in (_F32, _I32)
    if scores is not None and (not is_list or len(scores.data) < len(tokens)):
        yield LoadProblem("tokenizer.ggml.scores does not have a number for each token")
    name = (model.text("general.name") or "").lower()
    if any(each in name for each in _PHI):
        yield LoadProblem(f"general.name is {name!r}, for which llama.cpp expects the tokenizer of Phi-3")


def _part_problems(model: GgufModel) -> Iterator[LoadProblem]:
    """What ties the parts of a split model together, which llama.cpp reads of each."""
    count = len(model.parts) + len(model.missing_parts)
    declared = model.integer("split.count") or 0
    if declared != count and (declared > 1 or count > 1):
        yield LoadProblem(f"split.count is {declared}, and the model has {count} {'parts' if count > 1 else 'part'}")
        return
    for place, (name, part) in enumerate(model.parts.items() if count > 1 and not model.missing_parts else ()):
        number = part.metadata.get("split.no")
        if number is None or number.is_array or number.kind is not _U16:
            yield LoadProblem(f"split.no of {name} is missing or no uint16", number is not None and place > 0)
        elif number.data != place:
            yield LoadProblem(f"split.no of {name} is {number.data}, expected {place}")
    total = model.metadata.get("split.tensors.count")
    if count > 1 and (total is None or total.is_array or total.kind is not _I32):
        yield LoadProblem("split.tensors.count is missing or no int32")
    owners = Counter(name for part in model.parts.values() for name in part.tensors)
    repeated = next((name for name, number in owners.items() if number > 1), None)
    if repeated is not None:
        yield LoadProblem(f"{repeated} is in several parts")
