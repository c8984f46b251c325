"""Artefacts whose headers are right and whose weights are not."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np

from qtool.storage.gguf_model import RANK_HEAD, TOKEN_EMBEDDING
from tests.checks import surgery
from tests.checks.registry import STRUCTURE, WEIGHTS, case

COPY, NVFP4, GGUF, Q8_0 = "reranker/copy", "reranker/nvfp4", "reranker/gguf-f16", "reranker/gguf-q8_0"
TEXT_GGUF = "text-reranker/gguf-nvfp4"
FITTED, FITTED_GGUF = "reranker/calibrated", "text-reranker/gguf-calibrated"
"""Weights that were fitted to data: whatever is wrong with those to nearest is found in them, too."""
LAYERS = "model.language_model.layers."
LAYER = f"{LAYERS}1."
QUERY, KEY, VALUE = (f"{LAYER}self_attn.{letter}_proj" for letter in "qkv")
DOWN = f"{LAYER}mlp.down_proj"
EMBEDDING = "model.language_model.embed_tokens.weight"
YES, NO = 517, 527


def bits(tensor, type_of=np.uint8):
    """A writable view of a GGUF tensor's bytes."""
    return np.frombuffer(tensor.data, type_of).copy()


def put(tensors, name, data):
    """Give a GGUF tensor other bytes."""
    tensors[name] = replace(tensors[name], data=data.tobytes())


def alter(folder, name, change):
    """Let `change(array)` make new bits for one tensor of a checkpoint."""

    def cut(tensors):
        tensors[name] = tensors[name].holding(change(tensors[name].data))

    surgery.weights(folder, cut)


def swapped_rows(data, first=YES, second=NO):
    """Two rows in each other's place."""
    data[[first, second]] = data[[second, first]]
    return data


@case(WEIGHTS, "head-rows-exchanged", COPY, NVFP4, FITTED)
def yes_and_no_rows_swapped(folder):
    """The rows of yes and no have changed places"""
    alter(folder, EMBEDDING, swapped_rows)


def swap_in_the_rank_head(tensors):
    """No before yes."""
    data = bits(tensors[RANK_HEAD])
    put(tensors, RANK_HEAD, np.concatenate(np.split(data, 2)[::-1]))


@case(STRUCTURE, "gguf-head-exchanged", GGUF, Q8_0)
def yes_and_no_swapped_in_the_rank_head(folder):
    """The rows of the rank head have changed places"""
    surgery.gguf(folder, tensors=swap_in_the_rank_head)


@case(WEIGHTS, "head-rows-exchanged", TEXT_GGUF, FITTED_GGUF)
def yes_and_no_swapped_in_an_untied_rank_head(folder):
    """The rows of the rank head have changed places, and the file has no other copy of them"""
    surgery.gguf(folder, tensors=swap_in_the_rank_head)


@case(WEIGHTS, "head-other-rows", GGUF)
def head_from_the_wrong_rows(folder):
    """The rank head holds the rows of two other tokens"""

    def change(tensors):
        rows = bits(tensors[TOKEN_EMBEDDING], np.uint16).reshape(1024, -1)
        put(tensors, RANK_HEAD, rows[[300, 301]])

    surgery.gguf(folder, tensors=change)


@case(WEIGHTS, "rows-exchanged", COPY)
def two_tokens_exchanged(folder):
    """Two rows of the vocabulary have changed places"""
    alter(folder, EMBEDDING, lambda data: swapped_rows(data, 40, 41))


@case(WEIGHTS, "weights-exchanged", NVFP4, COPY, FITTED)
def query_and_key_exchanged(folder):
    """q and k of one layer are exchanged"""
    surgery.weights(folder, lambda tensors: surgery.exchange(tensors, f"{QUERY}.weight", f"{KEY}.weight"))


@case(WEIGHTS, "weights-exchanged", GGUF, TEXT_GGUF, FITTED_GGUF)
def gate_and_up_exchanged(folder):
    """gate and up of one layer are exchanged"""
    names = "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"
    surgery.gguf(folder, tensors=lambda tensors: surgery.exchange(tensors, *names))


@case(WEIGHTS, "weights-exchanged", NVFP4, FITTED)
def gate_and_up_exchanged_when_packed(folder):
    """gate and up of one layer are exchanged, scales and all"""
    names = f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"
    surgery.weights(folder, lambda tensors: surgery.exchange(tensors, *names))


@case(WEIGHTS, "layer-repeated", NVFP4, FITTED)
def layer_repeated(folder):
    """Layer 1 stands in the place of layer 2, too"""
    surgery.weights(folder, lambda tensors: surgery.copy(tensors, f"{LAYERS}1.", f"{LAYERS}2."))


@case(WEIGHTS, "layer-repeated", Q8_0)
def block_repeated(folder):
    """Block 1 stands in the place of block 2, too"""
    surgery.gguf(folder, tensors=lambda tensors: surgery.copy(tensors, "blk.1.", "blk.2."))


@case(WEIGHTS, "weights-misplaced", COPY)
def neighbour_in_its_place(folder):
    """One matrix is the next layer's"""
    names = f"{LAYERS}2.mlp.up_proj", f"{LAYERS}1.mlp.up_proj"
    surgery.weights(folder, lambda tensors: surgery.copy(tensors, *names))


@case(WEIGHTS, "other-projector", GGUF)
def projector_of_another_model(folder, builder):
    """The projector is that of another model of the same size"""
    shutil.copyfile(builder.good("reranker-revised/gguf-f16") / "mmproj.gguf", folder / "mmproj.gguf")


@case(WEIGHTS, "weights-differ", NVFP4, FITTED)
def norm_forgotten(folder):
    """The norm of the queries is all ones in one layer"""
    alter(folder, f"{LAYER}self_attn.q_norm.weight", lambda data: np.full_like(data, 0x3F80))


@case(WEIGHTS, "global-scale-inverted", NVFP4, FITTED)
def global_scale_inverted(folder):
    """q, k and v hold the inverse of their global scale"""

    def change(tensors):
        for module in (QUERY, KEY, VALUE):
            name = f"{module}.weight_scale_2"
            tensors[name] = tensors[name].holding(1 / tensors[name].data)

    surgery.weights(folder, change)


@case(WEIGHTS, "global-scale-inverted", TEXT_GGUF, FITTED_GGUF)
def global_scale_inverted_in_a_gguf_file(folder):
    """One matrix holds the inverse of its global scale"""

    def change(tensors):
        put(tensors, "blk.1.ffn_down.scale", 1 / bits(tensors["blk.1.ffn_down.scale"], np.float32))

    surgery.gguf(folder, tensors=change)


@case(WEIGHTS, "weights-scaled", NVFP4, FITTED)
def global_scale_of_another_convention(folder):
    """A global scale without the 448 of the block scales' range"""

    def change(tensors):
        tensors[f"{DOWN}.weight_scale_2"] = tensors[f"{DOWN}.weight_scale_2"].holding(
            tensors[f"{DOWN}.weight_scale_2"].data * 448
        )

    surgery.weights(folder, change)


@case(WEIGHTS, "weights-scaled", COPY)
def weights_doubled(folder):
    """One matrix is twice as large"""
    alter(folder, f"{DOWN}.weight", lambda data: np.where(data & 0x7F80, data + 0x80, data).astype(np.uint16))


@case(WEIGHTS, "nibbles-swapped", NVFP4, FITTED)
def nibbles_swapped(folder):
    """The first value of each pair stands in the high half"""
    alter(folder, f"{DOWN}.weight", lambda data: data >> 4 | data << 4)


@case(WEIGHTS, "block-scales-shifted", NVFP4, FITTED)
def block_scales_shifted(folder):
    """Each block scale stands one block late"""
    alter(folder, f"{DOWN}.weight_scale", lambda data: np.roll(data.reshape(-1), 1).reshape(data.shape))


@case(WEIGHTS, "weights-zero", NVFP4, FITTED)
def tensor_zeroed(folder):
    """One packed weight is all zeros"""
    alter(folder, f"{DOWN}.weight", np.zeros_like)


@case(WEIGHTS, "weights-zero", Q8_0)
def tensor_zeroed_in_a_gguf_file(folder):
    """One matrix is all zeros"""
    surgery.gguf(
        folder, tensors=lambda tensors: put(tensors, "blk.1.ffn_up.weight", bits(tensors["blk.1.ffn_up.weight"]) * 0)
    )


@case(WEIGHTS, "blocks-corrupt", NVFP4)
@case(WEIGHTS, "blocks-not-recorded", FITTED)
def bits_flipped(folder):
    """One bit is flipped in one block of ten thousand, at least in one"""

    def change(tensors):
        names = [name for name, raw in tensors.items() if raw.dtype == "U8"]
        sizes = [tensors[name].data.size // 8 for name in names]
        chosen = np.random.default_rng(0).choice(sum(sizes), max(sum(sizes) // 10_000, 1), replace=False)
        for block in chosen:
            place = int(np.searchsorted(np.cumsum(sizes), block, side="right"))
            flat = tensors[names[place]].data.reshape(-1)
            flat[8 * (block - sum(sizes[:place]))] ^= 0x04

    surgery.weights(folder, change)


@case(WEIGHTS, "blocks-corrupt", NVFP4)
@case(WEIGHTS, "blocks-not-recorded", FITTED)
def block_scale_damaged(folder):
    """One bit is flipped in one block scale"""

    def change(data):
        data[3, 1] ^= 0x10
        return data

    alter(folder, f"{DOWN}.weight_scale", change)


@case(WEIGHTS, "blocks-corrupt", Q8_0)
def bits_flipped_in_q8_0(folder):
    """One bit is flipped in one block of a Q8_0 file"""

    def change(tensors):
        data = bits(tensors["blk.1.ffn_up.weight"])
        data[34 * 5 + 10] ^= 0x08
        put(tensors, "blk.1.ffn_up.weight", data)

    surgery.gguf(folder, tensors=change)


@case(WEIGHTS, "blocks-corrupt", COPY, GGUF)
def one_value_damaged(folder):
    """One bit is flipped in one value"""
    if (folder / "model.gguf").exists():

        def change(tensors):
            data = bits(tensors["blk.1.ffn_up.weight"])
            data[21] ^= 0x04
            put(tensors, "blk.1.ffn_up.weight", data)

        surgery.gguf(folder, tensors=change)
        return
    alter(
        folder, f"{DOWN}.weight", lambda data: np.where(np.arange(data.size).reshape(data.shape) == 77, data ^ 8, data)
    )


@case(WEIGHTS, "other-revision", "reranker-shards/copy")
def shard_of_another_revision(folder, builder):
    """One of three shards is of another revision"""
    name = "model-00002-of-00003.safetensors"
    shutil.copyfile(builder.reference("reranker-revised") / name, folder / name)


@case(WEIGHTS, "weights-not-finite", COPY)
def not_a_number(folder):
    """One value is NaN"""

    def change(data):
        data[0, 0] = 0x7FC0
        return data

    alter(folder, f"{DOWN}.weight", change)


@case(WEIGHTS, "other-weights", NVFP4, FITTED)
def another_model(folder, builder):
    """It was quantized from another model of the same size"""
    source = builder.good("reranker-revised/nvfp4") / "model.safetensors"
    shutil.copyfile(source, folder / "model.safetensors")
