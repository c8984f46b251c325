"""Folders and files that an engine refuses, or reads otherwise, for a field that looks harmless."""

from __future__ import annotations

import json

import numpy as np

from qtool.storage.gguf import float32, string, uint32
from tests.checks import surgery
from tests.checks.folder_cases import COPY, EMBEDDER, NVFP4, QUERY, in_text
from tests.checks.gguf_field_cases import GGUF, added, put
from tests.checks.gguf_field_cases import TEXT as TEXT_GGUF
from tests.checks.loader_cases import TEXT, declare, tokenizer_config
from tests.checks.registry import STRUCTURE, case
from tests.checks.surgery import Raw

NORM = "model.language_model.norm.weight"


# config.json, as transformers' strict classes read it.


@case(STRUCTURE, "safetensors-field-type", COPY, NVFP4)
def null_for_a_number(folder):
    """The norms' epsilon is null, which is not the same as left out"""
    in_text(folder, rms_norm_eps=None)


@case(STRUCTURE, "safetensors-field-type", TEXT)
def null_for_a_flag(folder):
    """use_sliding_window is null"""
    surgery.config(folder, lambda config: config.update(use_sliding_window=None))


@case(STRUCTURE, "safetensors-field-type", COPY)
def null_for_a_token(folder):
    """The token of pictures is null"""
    surgery.config(folder, lambda config: config.update(image_token_id=None))


@case(STRUCTURE, "safetensors-field-type", COPY, TEXT)
def padding_beyond_the_vocabulary(folder):
    """pad_token_id is no row of the embedding, as after taking it from a model with more words"""
    surgery.config(folder, lambda config: config.get("text_config", config).update(pad_token_id=151643))


@case(STRUCTURE, "safetensors-field-type", COPY, TEXT)
def kinds_of_too_few_layers(folder):
    """layer_types lists one layer of three"""
    surgery.config(folder, lambda config: config.get("text_config", config).update(layer_types=["full_attention"]))


@case(STRUCTURE, "other-config", COPY, TEXT)
def classified_by_vllm(folder):
    """problem_type makes vLLM apply a softmax to the one score"""
    surgery.config(folder, lambda config: config.update(problem_type="single_label_classification"))


@case(STRUCTURE, "other-config", NVFP4)
def activation_of_an_old_cross_encoder(folder):
    """config.json names the activation of scores as sentence-transformers 3 did, and vLLM still reads that"""
    name = "torch.nn.modules.activation.Sigmoid"
    surgery.config(folder, lambda config: config.update(sbert_ce_default_activation_function=name))


# Weights.


@case(STRUCTURE, "safetensors-tensor-twice", COPY, NVFP4)
def norm_under_two_names(folder):
    """The last norm is stored with the prefix and, reversed, without: transformers takes the second"""
    short = NORM.removeprefix("model.")
    surgery.weights(folder, lambda tensors: tensors.update({short: tensors[NORM].holding(tensors[NORM].data[::-1])}))


@case(STRUCTURE, "safetensors-tensor-twice", NVFP4)
def scale_under_two_names(folder):
    """A global scale is stored under two names"""
    name = f"{QUERY}.weight_scale_2"
    surgery.weights(folder, lambda t: t.update({name.removeprefix("model."): t[name].holding(t[name].data * 2)}))


@case(STRUCTURE, "unreadable", COPY, NVFP4)
def header_with_a_number(folder):
    """The header of the weights describes them by a number, which the safetensors library refuses"""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps({**json.loads(data[8:end]), "__metadata__": {"format": "pt", "step": 9}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


# Modules of sentence-transformers.


@case(STRUCTURE, "other-side-file", NVFP4, EMBEDDER)
def modules_of_one_name(folder):
    """Two modules have the same name, and sentence-transformers loads the last of them only"""
    surgery.edit(folder / "modules.json", lambda modules: modules[1].update(name=modules[0]["name"]))


@case(STRUCTURE, "other-side-file", EMBEDDER)
def module_that_there_is_not(folder):
    """The class of the pooling stands where sentence-transformers has none, and vLLM does not know it"""
    place = "sentence_transformers.base.modules.pooling.Pooling"
    surgery.edit(folder / "modules.json", lambda modules: modules[1].update(type=place))


# The tokenizer and what puts pictures into its texts.


@case(STRUCTURE, "other-attention-mask", NVFP4, EMBEDDER)
def no_attention_mask(folder):
    """model_input_names leaves out the mask, so that the padding of a batch is read"""
    tokenizer_config(folder, model_input_names=["input_ids"])


@case(STRUCTURE, "other-token-ids", NVFP4)
def picture_token_among_extra_tokens(folder):
    """extra_special_tokens names another token for pictures"""
    tokenizer_config(folder, additional_special_tokens=None, extra_special_tokens={"image_token": "<|box_start|>"})


@case(STRUCTURE, "other-token-ids", COPY)
def picture_token_by_itself(folder):
    """tokenizer_config.json names another token for the end of a picture"""
    tokenizer_config(folder, vision_end_token="<|vision_start|>")


@case(STRUCTURE, "other-token-ids", NVFP4)
def video_token_of_the_model(folder):
    """model_specific_special_tokens makes the token of pictures that of videos"""
    tokenizer_config(folder, model_specific_special_tokens={"video_token": "<|image_pad|>"})


def processor_class(folder, file, name):
    """Name a class of processor in one of the files that may do so."""
    path = folder / file
    value = surgery.read_json(path) if path.exists() else {}
    path.write_text(json.dumps({**value, "processor_class": name}))


@case(STRUCTURE, "other-side-file", NVFP4, COPY)
def processor_of_another_model(folder):
    """preprocessor_config.json names a processor that puts no placeholders for pictures"""
    processor_class(folder, "preprocessor_config.json", "CLIPProcessor")


@case(STRUCTURE, "other-side-file", NVFP4)
def processor_in_a_file_of_its_own(folder):
    """processor_config.json, which transformers reads first, names the processor of an older family"""
    processor_class(folder, "processor_config.json", "Qwen2_5_VLProcessor")


@case(STRUCTURE, "other-side-file", COPY)
def processor_of_the_tokenizer(folder):
    """Only tokenizer_config.json names a processor, and it is another one"""
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        surgery.edit(folder / name, lambda config: config.pop("processor_class", None))
    processor_class(folder, "tokenizer_config.json", "LlavaProcessor")


# Quantization.


def quantize_activations(folder, dtype, data):
    """Declare W4A4 and give every packed weight an input_scale."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
            tensors[name.replace("weight_scale_2", "input_scale")] = Raw(dtype, data)

    surgery.weights(folder, change)
    declare(folder, quant_algo="NVFP4")
    surgery.edit(folder / "hf_quant_config.json", lambda config: config["quantization"].update(quant_algo="NVFP4"))


@case(STRUCTURE, "nvfp4-bad-scale", NVFP4)
def activations_scaled_by_nothing(folder):
    """The scales of the activations are zero"""
    quantize_activations(folder, "F32", np.array(0, np.float32))


@case(STRUCTURE, "nvfp4-scale-type", NVFP4)
def activations_scaled_in_bfloat16(folder):
    """The scales of the activations are BF16"""
    quantize_activations(folder, "BF16", np.array(0x3F80, np.uint16))


@case(STRUCTURE, "nvfp4-scale-shape", NVFP4)
def activations_scaled_by_channel(folder):
    """The scales of the activations are one for each channel"""
    quantize_activations(folder, "F32", np.ones(64, np.float32))


@case(STRUCTURE, "nvfp4-no-quantization-config", NVFP4)
def quantization_in_the_text_config(folder):
    """quantization_config has moved into text_config, where transformers and SGLang do not look"""

    def change(config):
        config["text_config"]["quantization_config"] = config.pop("quantization_config")

    surgery.config(folder, change)


@case(STRUCTURE, "nvfp4-scheme", NVFP4)
def fused_modules_of_another_model(folder):
    """packed_modules_mapping, by which SGLang finds excluded modules, names other parts of q, k and v"""
    declare(folder, packed_modules_mapping={"qkv_proj": ["query", "key", "value"]})


# GGUF files.


@case(STRUCTURE, "gguf-stray-scale", GGUF, TEXT_GGUF)
def plain_weight_scaled(folder):
    """A weight that is not NVFP4 has a scale of a half, and llama.cpp multiplies by it"""
    added(folder, "blk.1.ffn_up.scale", (1,))


@case(STRUCTURE, "gguf-unknown-tensor", GGUF, TEXT_GGUF)
def norm_scaled(folder):
    """A norm has a scale, which llama.cpp does not read: it counts the tensors and refuses the file"""
    added(folder, "blk.1.attn_norm.scale", (1,))


@case(STRUCTURE, "gguf-unknown-tensor", GGUF)
def embedding_scaled(folder):
    """The embedding has a scale"""
    added(folder, "token_embd.scale", (1,))


@case(STRUCTURE, "gguf-no-pooling", GGUF, TEXT_GGUF)
def called_an_adapter(folder):
    """general.type says adapter, which llama.cpp does not read, and nothing is pooled"""
    put(folder, "general.type", string("adapter"))
    put(folder, "pooling_type", uint32(0))


@case(STRUCTURE, "other-rope", TEXT_GGUF)
def called_a_matrix_of_importance(folder):
    """general.type says imatrix, and the rotary base is another one"""
    put(folder, "general.type", string("imatrix"))
    put(folder, "rope.freq_base", float32(1e4))
