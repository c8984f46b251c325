"""GGUF files that headers alone condemn."""

from __future__ import annotations

import shutil
from dataclasses import replace

from qtool.arch.prompts import TEXT_RERANKER, VL_RERANKER
from qtool.formats.ggml import GGML_TYPES, Q8_0
from qtool.storage.gguf_model import RANK_HEAD, RERANK_KEY
from tests.checks import surgery
from tests.checks.registry import STRUCTURE, case

GGUF = "reranker/gguf-f16"
TOKENS = "tokenizer.ggml.tokens"
Q4_0 = next(each for each in GGML_TYPES.values() if each.name == "Q4_0")


@case(STRUCTURE, "gguf-no-rank-head", GGUF)
def head_missing(folder):
    """The rank head was left out, as llama.cpp's converter does with a folder called `out`"""
    surgery.gguf(folder, tensors=lambda tensors: tensors.pop(RANK_HEAD))


@case(STRUCTURE, "gguf-head-quantized", "reranker/gguf-q8_0")
def head_in_four_bits(folder):
    """The rank head was quantized with the rest, as llama-quantize does"""

    def change(tensors):
        tensors[RANK_HEAD] = tensors[RANK_HEAD].changed(type=Q4_0)

    surgery.gguf(folder, tensors=change)


@case(STRUCTURE, "gguf-labels", GGUF)
def labels_exchanged(folder):
    """The labels say no before yes"""
    surgery.field(folder, "qwen3vl.classifier.output_labels", lambda labels: labels[::-1])


@case(STRUCTURE, "gguf-wrong-rerank-template", GGUF)
def text_template_in_a_vl_file(folder):
    """llama.cpp's converter bakes the text reranker's prompt into every reranker"""
    template = TEXT_RERANKER.template.replace("{instruction}", TEXT_RERANKER.default_instruction)
    surgery.field(folder, RERANK_KEY, lambda _: template)


@case(STRUCTURE, "gguf-no-rerank-template", GGUF)
def template_missing(folder):
    """No prompt is baked: llama.cpp then puts query and document together bare"""
    surgery.gguf(folder, fields=lambda fields: fields.pop(RERANK_KEY))


@case(STRUCTURE, "other-instruction", GGUF)
def instruction_changed(folder):
    """The baked instruction is another one"""
    template = VL_RERANKER.template.replace("{instruction}", "Find pictures of birds.")
    surgery.field(folder, RERANK_KEY, lambda _: template)


@case(STRUCTURE, "gguf-no-pooling", GGUF)
def pooling_none(folder):
    """Pooling NONE"""
    surgery.field(folder, "qwen3vl.pooling_type", lambda _: 0)


@case(STRUCTURE, "gguf-wrong-pooling", GGUF, "embedder/gguf-f16")
def pooling_mean(folder):
    """Pooling MEAN"""
    surgery.field(folder, "qwen3vl.pooling_type", lambda _: 1)


@case(STRUCTURE, "other-tokenizer", GGUF)
def tokenizer_of_another_model(folder):
    """The plain tokens are those of another vocabulary"""
    surgery.field(folder, TOKENS, lambda tokens: [*tokens[100:200], *tokens[:100], *tokens[200:]])


@case(STRUCTURE, "added-token-missing", GGUF)
def added_token_dropped(folder):
    """An added token has become plain text"""
    surgery.field(folder, TOKENS, lambda tokens: ["[gone]" if t == "<|box_start|>" else t for t in tokens])


@case(STRUCTURE, "other-tokenizer", GGUF)
def merges_of_another_model(folder):
    """The merges are another tokenizer's"""
    surgery.field(folder, "tokenizer.ggml.merges", lambda merges: merges[10:])


@case(STRUCTURE, "other-rope", GGUF)
def rope_theta_wrong(folder):
    """The rotary base is ten times too small"""
    surgery.field(folder, "qwen3vl.rope.freq_base", lambda base: base / 10)


@case(STRUCTURE, "other-rope", GGUF)
def mrope_sections_wrong(folder):
    """Time and height have exchanged their frequencies"""
    sections = "qwen3vl.rope.dimension_sections"
    surgery.field(folder, sections, lambda old: [old[1], old[0], *old[2:]])


@case(STRUCTURE, "other-epsilon", GGUF)
def rms_epsilon_wrong(folder):
    """The norms' epsilon is ten times too large"""
    surgery.field(folder, "qwen3vl.attention.layer_norm_rms_epsilon", lambda epsilon: epsilon * 10)


@case(STRUCTURE, "other-deepstack", GGUF)
def deepstack_count_zero(folder):
    """No layer is told to take deepstack features"""
    surgery.field(folder, "qwen3vl.n_deepstack_layers", lambda _: 0)


@case(STRUCTURE, "gguf-missing-tensor", GGUF)
def query_norm_dropped(folder):
    """The norm of the queries is missing in one layer"""
    surgery.gguf(folder, tensors=lambda tensors: tensors.pop("blk.1.attn_q_norm.weight"))


@case(STRUCTURE, "protected-type", "reranker/gguf-q8_0")
def norm_quantized(folder):
    """A norm was quantized with the matrices"""

    def change(tensors):
        name = "blk.1.attn_norm.weight"
        tensors[name] = tensors[name].changed(type=Q8_0)

    surgery.gguf(folder, tensors=change)


@case(STRUCTURE, "mmproj-width", GGUF)
def projector_of_another_size(folder, builder):
    """The projector is that of a wider model"""
    shutil.copyfile(builder.good("reranker-wide/gguf-f16") / "mmproj.gguf", folder / "mmproj.gguf")


@case(STRUCTURE, "other-side-file", GGUF)
def pixels_normalized_otherwise(folder):
    """The projector shifts pixels by CLIP's mean"""
    mean = [0.48145466, 0.4578275, 0.40821073]
    surgery.field(folder, "clip.vision.image_mean", lambda _: mean, "mmproj.gguf")


@case(STRUCTURE, "unreadable", GGUF)
def cut_off(folder):
    """The download stopped in the middle"""
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@case(STRUCTURE, "nvfp4-missing-scale", "text-reranker/gguf-nvfp4")
def global_scale_lost(folder):
    """An NVFP4 tensor has lost its global scale"""
    surgery.gguf(folder, tensors=lambda tensors: tensors.pop("blk.0.attn_q.scale"))


@case(STRUCTURE, "other-architecture", GGUF)
def another_family(folder, builder):
    """It is the text family's model"""
    shutil.rmtree(folder)
    shutil.copytree(builder.good("text-reranker/gguf-f16"), folder)


@case(STRUCTURE, "gguf-prompt-token", GGUF)
def prompt_token_plain(folder):
    """A token of the prompt is marked as plain text, so that llama.cpp does not find it"""

    def change(fields):
        place = fields[TOKENS].data.index("<|im_start|>")
        kinds = fields["tokenizer.ggml.token_type"]
        fields["tokenizer.ggml.token_type"] = replace(
            kinds, data=[1 if i == place else k for i, k in enumerate(kinds.data)]
        )

    surgery.gguf(folder, fields=change)
