"""Weights that are near the reference's and not it, and weights that are right and stored otherwise than they are read."""

from __future__ import annotations

import numpy as np

from qtool.formats.floats import E4M3_VALUES, FLOAT_FORMATS, encode_e4m3
from qtool.formats.ggml import Q8_0
from qtool.formats.ggml import encode_reference as encode_ggml
from qtool.formats.nvfp4 import block_scale_codes, encode_reference, global_scale
from qtool.storage.gguf_model import RANK_HEAD
from tests.checks import surgery
from tests.checks.registry import WEIGHTS, case
from tests.checks.weight_cases import (
    COPY,
    DOWN,
    FITTED,
    FITTED_GGUF,
    GGUF,
    LAYER,
    LAYERS,
    NVFP4,
    QUERY,
    TEXT_GGUF,
    alter,
    bits,
    put,
)
from tests.checks.weight_cases import (
    Q8_0 as Q8,
)

BF16 = FLOAT_FORMATS["BF16"]
TOWER = "model.visual.blocks.1.attn.qkv.weight"
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def plain(builder, name, reference="reranker"):
    """A weight of the reference as float32."""
    return BF16.widen(surgery.read_weights(builder.reference(reference) / "model.safetensors")[name].data)


def rounded(values):
    """The nearest BF16 of each, as bits."""
    data = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((data + 0x7FFF + (data >> 16 & 1)) >> 16).astype(np.uint16)


def requantize(folder, values_of):
    """Quantize some modules again, from other weights: `values_of` by module; fused ones share their global scale."""
    groups = {}
    for module, values in values_of.items():
        group = (
            module.replace("q_proj", "qkv")
            .replace("k_proj", "qkv")
            .replace("v_proj", "qkv")
            .replace("up_proj", "gate_proj")
        )
        groups.setdefault(group, []).append((module, np.abs(values).max()))
    largest = {module: max(amax for _, amax in group) for group in groups.values() for module, _ in group}

    def change(tensors):
        for module, values in values_of.items():
            scale = global_scale(largest[module])
            packed, scales = encode_reference(values.reshape(-1), scale)
            for suffix, data in (("weight", packed), ("weight_scale", scales)):
                name = f"{module}.{suffix}"
                tensors[name] = tensors[name].holding(data.reshape(tensors[name].data.shape))
            tensors[f"{module}.weight_scale_2"] = tensors[f"{module}.weight_scale_2"].holding(np.float32(scale))

    surgery.weights(folder, change)


def noisy(values, part, seed=0):
    """Each weight times a random number near 1."""
    return values * (1 + part * np.random.default_rng(seed).normal(size=values.shape)).astype(np.float32)


# Small changes.


@case(WEIGHTS, "weights-changed", NVFP4, FITTED)
def noise_before_quantizing(folder, builder):
    """One matrix was quantized with half a percent of noise"""
    requantize(folder, {DOWN: noisy(plain(builder, f"{DOWN}.weight"), 0.005)})


@case(WEIGHTS, "weights-changed", NVFP4, FITTED)
def noise_in_a_layer(folder, builder):
    """One layer was quantized with two percent of noise"""
    modules = [f"{LAYER}{each}" for each in MATRICES]
    requantize(folder, {each: noisy(plain(builder, f"{each}.weight"), 0.02) for each in modules})


@case(WEIGHTS, "weights-changed", NVFP4, FITTED)
def a_training_step(folder, builder):
    """One matrix was quantized after a small step of training"""
    values = plain(builder, f"{DOWN}.weight")
    step = np.random.default_rng(1).choice([-1, 1], values.shape) * np.float32(0.01 * values.std())
    requantize(folder, {DOWN: values + step})


@case(WEIGHTS, "weights-changed", COPY)
def noise_in_a_copy(folder):
    """One matrix has half a percent of noise"""
    alter(folder, f"{DOWN}.weight", lambda data: rounded(noisy(BF16.widen(data), 0.005)))


@case(WEIGHTS, "weights-changed", COPY)
def norm_of_another_revision(folder):
    """One norm has taken a small step"""
    alter(folder, f"{LAYER}input_layernorm.weight", lambda data: data + np.uint16(1))


def noise_in_a_gguf_file(folder, kind):
    """Noise in one matrix, rounded as the type rounds."""

    def change(tensors):
        name = "blk.1.ffn_up.weight"
        old = tensors[name]
        if kind is Q8_0:
            blocks = np.frombuffer(old.data, np.uint8).reshape(-1, 34)
            scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
            values = (blocks[:, 2:].view(np.int8) * scales).reshape(-1)
            put(tensors, name, encode_ggml(noisy(values, 0.02), kind))
        else:
            values = np.frombuffer(old.data, np.float16).astype(np.float32)
            put(tensors, name, noisy(values, 0.005).astype(np.float16))

    surgery.gguf(folder, tensors=change)


@case(WEIGHTS, "weights-changed", Q8)
def noise_in_q8_0(folder):
    """One matrix of a Q8_0 file has noise"""
    noise_in_a_gguf_file(folder, Q8_0)


@case(WEIGHTS, "weights-changed", GGUF)
def noise_in_f16(folder):
    """One matrix of an F16 file has noise"""
    noise_in_a_gguf_file(folder, None)


@case(WEIGHTS, "weights-revised", COPY)
def another_revision_of_every_weight(folder):
    """Every matrix has taken a small step of training"""

    def change(tensors):
        for name, raw in tensors.items():
            if raw.data.ndim > 1:
                tensors[name] = raw.holding(rounded(noisy(BF16.widen(raw.data), 0.01)))

    surgery.weights(folder, change)


@case(WEIGHTS, "weights-revised", NVFP4, FITTED)
def quantized_from_another_revision(folder, builder):
    """Every matrix was quantized after a small step of training"""
    modules = [f"{LAYERS}{layer}.{each}" for layer in range(3) for each in MATRICES]
    requantize(folder, {each: noisy(plain(builder, f"{each}.weight"), 0.01) for each in modules})


@case(WEIGHTS, "scales-not-as-declared", NVFP4)
@case(WEIGHTS, "weights-not-recorded", FITTED)
def scales_of_a_search(folder, builder):
    """The block scales of one matrix are a search's, and the recipe declares those of the maxima"""

    def change(tensors):
        values = plain(builder, f"{DOWN}.weight").reshape(-1, 16)
        scale = tensors[f"{DOWN}.weight_scale_2"].data
        maxima = np.abs(values).max(axis=1) * np.float32(1.5)  # so that the largest value becomes 4
        scales = block_scale_codes(maxima, scale)
        packed, _ = encode_under(values, scales, scale)
        tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].holding(
            packed.reshape(tensors[f"{DOWN}.weight"].data.shape)
        )
        name = f"{DOWN}.weight_scale"
        tensors[name] = tensors[name].holding(scales.reshape(tensors[name].data.shape))

    surgery.weights(folder, change)


def encode_under(values, scales, scale):
    """The nearest codes [n/2] of blocks [n/16, 16] under these block scales."""
    quotients = values / (E4M3_VALUES[scales] * scale)[:, None]
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    codes = np.abs(np.abs(quotients)[..., None] - magnitudes).argmin(axis=-1).astype(np.uint8)
    codes |= np.where(quotients < 0, 8, 0).astype(np.uint8)
    return (codes[:, ::2] | codes[:, 1::2] << 4).reshape(-1), scales


# Other models.


@case(WEIGHTS, "other-weights", COPY)
def sibling(folder):
    """The weights are a sibling's, trained further from the same model"""

    def change(tensors):
        for name, raw in tensors.items():
            if raw.data.ndim > 1:
                values = BF16.widen(raw.data)
                tensors[name] = raw.holding(
                    rounded(values + 0.3 * values.std() * np.random.default_rng(2).normal(size=values.shape))
                )

    surgery.weights(folder, change)


@case(WEIGHTS, "other-projector", GGUF)
def projector_of_a_sibling(folder):
    """The projector is a sibling's, trained further from the same tower"""

    def change(tensors):
        for name, each in tensors.items():
            if each.output.type.name == "F16":
                values = bits(each, np.float16).astype(np.float32)
                put(
                    tensors,
                    name,
                    (values + 0.3 * values.std() * np.random.default_rng(3).normal(size=values.shape)).astype(
                        np.float16
                    ),
                )

    surgery.gguf(folder, tensors=change, name="mmproj.gguf")


@case(WEIGHTS, "layers-shifted", COPY)
def layers_shifted_by_one(folder):
    """Each layer holds the weights of the one before"""

    def change(tensors):
        old = dict(tensors)
        for name in tensors:
            if name.startswith(LAYERS):
                layer, rest = name.removeprefix(LAYERS).split(".", 1)
                tensors[name] = old[f"{LAYERS}{max(int(layer) - 1, 0)}.{rest}"]

    surgery.weights(folder, change)


@case(WEIGHTS, "head-rows-doubled", GGUF, TEXT_GGUF, FITTED_GGUF)
def head_with_one_row_twice(folder):
    """Both rows of the rank head are that of yes"""

    def change(tensors):
        half = bits(tensors[RANK_HEAD])[: len(tensors[RANK_HEAD].data) // 2]
        put(tensors, RANK_HEAD, np.concatenate([half, half]))

    surgery.gguf(folder, tensors=change)


# Right weights that are read wrongly.


@case(WEIGHTS, "block-scales-swizzled", NVFP4, FITTED)
def scales_in_tiles(folder):
    """The block scales lie as tensor cores want them"""

    def swizzle(data):
        rows, columns = data.shape
        return data.reshape(rows // 128, 4, 32, columns // 4, 4).transpose(0, 3, 2, 1, 4).reshape(data.shape)

    alter(folder, f"{LAYER}mlp.gate_proj.weight_scale", swizzle)


@case(WEIGHTS, "codes-twos-complement", NVFP4, FITTED)
def codes_in_twos_complement(folder):
    """Negative codes are two's complement"""
    table = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 15, 14, 13, 12, 11, 10, 9], np.uint8)
    alter(folder, f"{DOWN}.weight", lambda data: table[data & 15] | table[data >> 4] << 4)


@case(WEIGHTS, "codes-renumbered", NVFP4, FITTED)
def sign_in_the_lowest_bit(folder):
    """The sign of each code is its lowest bit"""
    table = np.array([(code & 7) << 1 | code >> 3 for code in range(16)], np.uint8)
    alter(folder, f"{DOWN}.weight", lambda data: table[data & 15] | table[data >> 4] << 4)


@case(WEIGHTS, "codes-renumbered", NVFP4, FITTED)
def signs_inverted(folder):
    """Every sign is the other one"""
    alter(folder, f"{DOWN}.weight", lambda data: data ^ 0x88)


@case(WEIGHTS, "block-scales-inverted", NVFP4, FITTED)
def block_scales_inverted(folder):
    """Each block scale is stored as its reciprocal"""
    alter(
        folder,
        f"{DOWN}.weight_scale",
        lambda data: encode_e4m3((1 / E4M3_VALUES[data]).astype(np.float32).reshape(-1)).reshape(data.shape),
    )


@case(WEIGHTS, "block-scales-misplaced", NVFP4, FITTED)
def block_scales_of_the_next_layer(folder):
    """One matrix has the block scales of the next layer's"""

    def change(tensors):
        name = f"{DOWN}.weight_scale"
        tensors[name] = tensors[name.replace(".1.", ".2.")]

    surgery.weights(folder, change)


@case(WEIGHTS, "global-scale-misplaced", NVFP4, FITTED)
def global_scale_of_another_layer(folder):
    """One matrix has the global scale of another"""

    def change(tensors):
        tensors[f"{DOWN}.weight_scale_2"] = tensors[f"{LAYERS}2.self_attn.o_proj.weight_scale_2"]

    surgery.weights(folder, change)


@case(WEIGHTS, "columns-permuted", NVFP4, FITTED)
def codes_in_the_order_of_ggml(folder):
    """In each block the codes lie as llama.cpp packs them"""

    def change(data):
        codes = np.stack([data & 15, data >> 4], axis=-1).reshape(-1, 16)
        return (codes[:, :8] | codes[:, 8:] << 4).reshape(data.shape)

    alter(folder, f"{DOWN}.weight", change)


@case(WEIGHTS, "weights-transposed", COPY, GGUF)
def matrix_transposed(folder):
    """One square matrix is transposed"""
    if (folder / "model.gguf").exists():
        name = "blk.1.attn_output.weight"
        surgery.gguf(folder, tensors=lambda t: put(t, name, bits(t[name], np.uint16).reshape(64, 64).T))
    else:
        alter(folder, f"{LAYER}self_attn.o_proj.weight", lambda data: data.T)


@case(WEIGHTS, "rope-permuted", COPY)
def rows_woven_for_another_rope(folder):
    """The rows of each head are woven as converters do for Llama"""
    alter(folder, f"{QUERY}.weight", lambda d: d.reshape(2, 2, 16, -1).swapaxes(1, 2).reshape(d.shape))


@case(WEIGHTS, "rope-permuted", GGUF)
def rows_woven_in_a_gguf_file(folder):
    """The rows of each head are woven as llama.cpp wants them of other families"""

    def change(tensors):
        name = "blk.1.attn_k.weight"
        rows = bits(tensors[name], np.uint16).reshape(2, 2, 16, -1)
        put(tensors, name, np.ascontiguousarray(rows.swapaxes(1, 2)))

    surgery.gguf(folder, tensors=change)


@case(WEIGHTS, "rows-permuted", COPY)
def rows_reversed(folder):
    """The rows of one matrix stand in reverse order"""
    alter(folder, f"{LAYER}mlp.gate_proj.weight", lambda data: data[::-1])


@case(WEIGHTS, "bytes-swapped", COPY, GGUF)
def bytes_in_another_order(folder):
    """The numbers of one matrix have another byte order"""
    if (folder / "model.gguf").exists():
        name = "blk.1.ffn_up.weight"
        surgery.gguf(folder, tensors=lambda tensors: put(tensors, name, bits(tensors[name], np.uint16).byteswap()))
    else:
        alter(folder, f"{DOWN}.weight", lambda data: data.byteswap())


@case(WEIGHTS, "fused-parts-moved", COPY)
def fused_parts_in_another_order(folder):
    """In the vision tower k stands before q"""
    alter(folder, TOWER, lambda data: np.concatenate([np.split(data, 3)[part] for part in (1, 0, 2)]))


@case(WEIGHTS, "weights-scaled", GGUF)
def weights_negated(folder):
    """The numbers of one matrix have the other sign"""
    name = "blk.1.ffn_up.weight"
    surgery.gguf(folder, tensors=lambda tensors: put(tensors, name, bits(tensors[name], np.uint16) ^ 0x8000))
