"""GGUF fields, prompts and tensors that llama.cpp reads and that a plan of the reference's own fields would not show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from gguf.constants import GGUFValueType, TokenType

from qtool.arch.prompts import VL_RERANKER
from qtool.formats.ggml import BF16, F16, F32
from qtool.storage.gguf import Value, boolean, float32, string, uint32
from qtool.storage.gguf_layout import GgufOutputTensor
from qtool.storage.gguf_model import RERANK_KEY
from tests.checks import surgery
from tests.checks.registry import STRUCTURE, case
from tests.checks.rewriting import Tensor

GGUF, TEXT, EMBEDDER = "reranker/gguf-f16", "text-reranker/gguf-f16", "embedder/gguf-f16"
PROJECTOR = "mmproj.gguf"


def put(folder, name, value, file="model.gguf"):
    """Set one field; names without a dot belong to the architecture."""

    def change(fields):
        architecture = fields["general.architecture"].data
        fields[name if name.split(".")[0] in ("tokenizer", "general", "clip") else f"{architecture}.{name}"] = value

    surgery.gguf(folder, fields=change, name=file)


def drop(folder, key, file="model.gguf"):
    """Leave out one field."""
    surgery.gguf(folder, fields=lambda fields: fields.pop(key), name=file)


def retyped(folder, name, change, file="model.gguf"):
    """Let `change(values)` give a float tensor other values, and a type."""

    def cut(tensors):
        old = tensors[name]
        kinds = {"F32": np.float32, "F16": np.float16}
        values = np.frombuffer(old.data, kinds[old.output.type.name]).astype(np.float32)
        kind, data = change(values)
        tensors[name] = replace(old.changed(type=kind), data=data)

    surgery.gguf(folder, tensors=cut, name=file)


def added(folder, name, shape, file="model.gguf", value=0.5):
    """Add a tensor of equal numbers."""
    data = np.full(shape, value, np.float32).tobytes()
    tensor = Tensor(GgufOutputTensor(name, F32, shape, len(data)), data)
    surgery.gguf(folder, tensors=lambda tensors: tensors.update({name: tensor}), name=file)


# Attention and positions.


@case(STRUCTURE, "gguf-not-causal", GGUF, TEXT)
def attention_of_an_encoder(folder):
    """Attention is declared not to be causal"""
    put(folder, "attention.causal", boolean(False))


@case(STRUCTURE, "gguf-aborts", GGUF, TEXT)
def scaling_of_an_unknown_type(folder):
    """Positions are scaled in a way that llama.cpp does not know, which ends the process"""
    put(folder, "rope.scaling.type", string("dynamic"))


@case(STRUCTURE, "gguf-aborts", GGUF, TEXT)
def half_of_each_head_turned(folder):
    """Only half of each head is turned with its position"""
    put(folder, "rope.dimension_count", uint32(16))


@case(STRUCTURE, "gguf-aborts", GGUF)
def no_dimension_for_positions(folder):
    """The sections for time, height and width are all zero"""
    surgery.field(folder, "qwen3vl.rope.dimension_sections", lambda _: [0, 0, 0, 0])


@case(STRUCTURE, "gguf-refused", GGUF)
def sections_without_the_fourth(folder):
    """There are three sections, and llama.cpp wants four"""
    surgery.field(folder, "qwen3vl.rope.dimension_sections", lambda old: old[:3])


@case(STRUCTURE, "other-rope", GGUF, TEXT)
def positions_scaled(folder):
    """Positions are divided by four, as for a longer context"""
    put(folder, "rope.scaling.type", string("yarn"))
    put(folder, "rope.scaling.factor", float32(4))


@case(STRUCTURE, "other-rope", GGUF)
def positions_scaled_by_the_old_key(folder):
    """Positions are divided by four by the key of old files"""
    put(folder, "rope.scale_linear", float32(4))


@case(STRUCTURE, "other-rope", TEXT)
def attention_factor(folder):
    """The attention is scaled with the positions"""
    put(folder, "rope.scaling.attn_factor", float32(2))


@case(STRUCTURE, "other-config", GGUF)
def scores_of_the_mean(folder):
    """The rank head is applied to the mean of all tokens"""
    put(folder, "classifier.pooling_type", uint32(1))


@case(STRUCTURE, "gguf-aborts", TEXT)
def negative_epsilon(folder):
    """The norms' epsilon is negative"""
    surgery.field(folder, "qwen3.attention.layer_norm_rms_epsilon", lambda epsilon: -epsilon)


@case(STRUCTURE, "gguf-aborts", TEXT)
def wider_output(folder):
    """The output is declared wider than it is, and llama.cpp reads beyond it"""
    put(folder, "embedding_length_out", uint32(4096))


@case(STRUCTURE, "gguf-aborts", TEXT)
def experts_declared(folder):
    """Experts are declared, and there are none"""
    put(folder, "expert_count", uint32(4))


@case(STRUCTURE, "gguf-refused", GGUF, TEXT)
def field_of_another_type(folder):
    """The number of layers is a signed number, which llama.cpp refuses"""
    put(folder, "block_count", Value(GGUFValueType.INT32, 3))


@case(STRUCTURE, "gguf-refused", TEXT)
def number_as_a_text(folder):
    """The rotary base is a text"""
    put(folder, "rope.freq_base", string("1000000"))


# The tokenizer.


@case(STRUCTURE, "gguf-aborts", GGUF, TEXT)
def token_twice(folder):
    """Two tokens have the same text"""
    surgery.field(folder, "tokenizer.ggml.tokens", lambda tokens: [*tokens[:-1], tokens[-2]])


@case(STRUCTURE, "other-token-types", TEXT)
def word_marked_as_control(folder):
    """A plain word is marked as a control token, so that longer words are cut at it"""

    def change(kinds):
        place = kinds.index(int(TokenType.NORMAL)) + 300
        return [int(TokenType.CONTROL) if i == place else kind for i, kind in enumerate(kinds)]

    surgery.field(folder, "tokenizer.ggml.token_type", change)


@case(STRUCTURE, "other-tokenizer", GGUF)
def merges_reordered(folder):
    """Two merge rules have changed places"""
    surgery.field(folder, "tokenizer.ggml.merges", lambda merges: [merges[1], merges[0], *merges[2:]])


@case(STRUCTURE, "other-tokenizer", GGUF)
def two_words_exchanged(folder):
    """Two plain tokens have each other's number"""
    surgery.field(folder, "tokenizer.ggml.tokens", lambda t: [*t[:300], t[301], t[300], *t[302:]])


@case(STRUCTURE, "gguf-start-token", GGUF)
def start_token_added(folder):
    """llama.cpp is told to add a start token"""
    put(folder, "tokenizer.ggml.add_bos_token", boolean(True))


@case(STRUCTURE, "gguf-end-token", EMBEDDER)
def end_token_added(folder):
    """llama.cpp is told to add an end token, from which an embedder would be read"""
    put(folder, "tokenizer.ggml.add_eos_token", boolean(True))


@case(STRUCTURE, "gguf-refused", TEXT)
def flag_as_a_number(folder):
    """A flag of the tokenizer is a number"""
    put(folder, "tokenizer.ggml.add_bos_token", uint32(0))


# The baked prompt, byte for byte.


def prompt(folder, change):
    """Let `change(text)` give another baked prompt."""
    surgery.field(folder, RERANK_KEY, change)


@case(STRUCTURE, "gguf-padded-rerank-template", GGUF, TEXT)
def newline_before_the_prompt(folder):
    """The baked prompt begins with a newline, which llama.cpp sends"""
    prompt(folder, lambda text: "\n" + text)


@case(STRUCTURE, "gguf-padded-rerank-template", GGUF, TEXT)
def space_after_the_prompt(folder):
    """The baked prompt ends with a space, and the answer is read from there"""
    prompt(folder, lambda text: text + " ")


@case(STRUCTURE, "gguf-padded-rerank-template", GGUF)
def start_token_in_the_prompt(folder):
    """A start token is baked into the prompt"""
    prompt(folder, lambda text: "<|endoftext|>" + text)


@case(STRUCTURE, "gguf-respaced-rerank-template", GGUF)
def newline_lost_in_the_prompt(folder):
    """A newline of the baked prompt has become a space"""
    prompt(folder, lambda text: text.replace("<|im_start|>assistant\n", "<|im_start|>assistant "))


@case(STRUCTURE, "gguf-respaced-rerank-template", GGUF)
def windows_line_ends(folder):
    """The baked prompt has Windows line ends"""
    prompt(folder, lambda text: text.replace("\n", "\r\n"))


@case(STRUCTURE, "gguf-exchanged-placeholders", GGUF, TEXT)
def query_and_document_exchanged_in_the_prompt(folder):
    """The document stands in the place of the query"""
    prompt(folder, lambda t: t.replace("{query}", "{}").replace("{document}", "{query}").replace("{}", "{document}"))


@case(STRUCTURE, "gguf-doubled-placeholder", GGUF)
def query_twice_in_the_prompt(folder):
    """The query is in the baked prompt twice"""
    prompt(folder, lambda text: text.replace("{query}", "{query} {query}"))


@case(STRUCTURE, "gguf-doubled-placeholder", GGUF)
def document_in_the_instruction(folder):
    """The instruction of the baked prompt has a place for the document, too"""
    prompt(folder, lambda _: VL_RERANKER.template.replace("{instruction}", "Rank {document}."))


@case(STRUCTURE, "gguf-incomplete-rerank-template", GGUF)
def document_lost_from_the_prompt(folder):
    """The baked prompt has no place for the document"""
    prompt(folder, lambda text: text.replace("{document}", ""))


@case(STRUCTURE, "gguf-incomplete-rerank-template", GGUF)
def placeholders_of_jinja(folder):
    """The baked prompt has Jinja's placeholders, which llama.cpp does not fill in"""
    prompt(folder, lambda text: text.replace("{query}", "{{ query }}").replace("{document}", "{{ document }}"))


@case(STRUCTURE, "other-baked-prompt", GGUF, TEXT)
def another_prompt(folder):
    """The baked prompt is somebody's own"""
    prompt(folder, lambda _: "Is {document} an answer to {query}?")


@case(STRUCTURE, "other-baked-prompt", GGUF)
def word_lost_in_the_prompt(folder):
    """One word of the baked prompt is missing"""
    prompt(folder, lambda text: text.replace("Judge whether", "Judge if"))


@case(STRUCTURE, "gguf-ranker-markers", EMBEDDER)
def rerank_template_in_an_embedder(folder):
    """An embedder holds a rerank template"""
    put(folder, RERANK_KEY, string("{query} {document}"))


# Tensors that llama.cpp takes, and types that it does not.


@case(STRUCTURE, "gguf-unknown-tensor", GGUF, TEXT)
def layer_too_many(folder):
    """The file has a tensor of a fourth layer, and declares three"""
    added(folder, "blk.3.attn_norm.weight", (64,))


@case(STRUCTURE, "gguf-unknown-tensor", GGUF)
def bias_of_another_model(folder):
    """A query bias was added, which llama.cpp would use"""
    added(folder, "blk.1.attn_q.bias", (64,))


@case(STRUCTURE, "gguf-unknown-tensor", GGUF)
def second_rank_head(folder):
    """There is a second classification layer"""
    added(folder, "cls.weight", (64, 64))


@case(STRUCTURE, "gguf-aborts", GGUF, TEXT)
def norm_in_half_precision(folder):
    """A norm is stored as F16, with which llama.cpp ends the process"""
    retyped(folder, "blk.1.attn_norm.weight", lambda v: (F16, v.astype(np.float16).tobytes()))


@case(STRUCTURE, "gguf-aborts", TEXT)
def norm_in_bfloat16(folder):
    """The last norm is stored as BF16"""
    retyped(folder, "output_norm.weight", lambda v: (BF16, (v.view(np.uint32) >> 16).astype(np.uint16).tobytes()))


# The projector.


@case(STRUCTURE, "other-config", GGUF)
def projector_without_gelu(folder):
    """The projector does not say that it uses GELU, and llama.cpp takes a quicker function"""
    drop(folder, "clip.use_gelu", PROJECTOR)


@case(STRUCTURE, "other-config", GGUF)
def projector_with_silu(folder):
    """The projector declares SiLU in the place of GELU"""
    put(folder, "clip.use_gelu", boolean(False), PROJECTOR)
    put(folder, "clip.use_silu", boolean(True), PROJECTOR)


@case(STRUCTURE, "gguf-refused", GGUF)
def projector_with_two_activations(folder):
    """The projector declares GELU and SiLU"""
    put(folder, "clip.use_silu", boolean(True), PROJECTOR)


@case(STRUCTURE, "other-epsilon", GGUF)
def projector_epsilon(folder):
    """The epsilon of the projector's norms is ten times too large"""
    surgery.field(folder, "clip.vision.attention.layer_norm_epsilon", lambda epsilon: epsilon * 10, PROJECTOR)


@case(STRUCTURE, "other-size", GGUF)
def projector_with_one_head(folder):
    """The vision tower has one attention head in the place of two"""
    put(folder, "clip.vision.attention.head_count", uint32(1), PROJECTOR)


@case(STRUCTURE, "other-side-file", GGUF)
def pixels_scaled_otherwise(folder):
    """The projector divides pixels by CLIP's standard deviation"""
    spread = [0.26862954, 0.26130258, 0.27577711]
    surgery.field(folder, "clip.vision.image_std", lambda _: spread, PROJECTOR)


@case(STRUCTURE, "gguf-aborts", GGUF)
def projector_field_of_another_type(folder):
    """A size of the projector is a signed number, with which llama.cpp ends the process"""
    put(folder, "clip.vision.patch_size", Value(GGUFValueType.INT32, 16), PROJECTOR)


@case(STRUCTURE, "gguf-aborts", GGUF)
def projector_merges_sixteen(folder):
    """The projector declares that it merges sixteen patches"""
    put(folder, "clip.vision.spatial_merge_size", uint32(4), PROJECTOR)


@case(STRUCTURE, "mmproj-missing-tensor", GGUF)
def projector_without_a_bias(folder):
    """The projector lacks a bias, which llama.cpp reads without asking"""
    surgery.gguf(folder, tensors=lambda tensors: tensors.pop("v.blk.0.attn_qkv.bias"), name=PROJECTOR)


@case(STRUCTURE, "mmproj-taken-tensor", GGUF)
def projector_with_a_gate(folder):
    """The projector holds a gate that the family does not have, and llama.cpp multiplies by it"""
    added(folder, "v.blk.0.ffn_gate.weight", (64, 32), PROJECTOR)


@case(STRUCTURE, "mmproj-taken-tensor", GGUF)
def projector_with_a_norm_before(folder):
    """The projector holds a norm before the first layer"""
    added(folder, "v.pre_ln.weight", (32,), PROJECTOR)


@case(STRUCTURE, "mmproj-deepstack-flags", GGUF)
def projector_flags_another_layer(folder):
    """The projector flags another layer for deepstack than the one that it has a merger for"""
    surgery.field(folder, "clip.vision.is_deepstack_layers", lambda flags: flags[::-1], PROJECTOR)


@case(STRUCTURE, "mmproj-deepstack-flags", GGUF)
def projector_without_deepstack_flags(folder):
    """The projector does not say which layers feed deepstack"""
    surgery.field(folder, "clip.vision.is_deepstack_layers", lambda _: [], PROJECTOR)
