"""Folders that engines read otherwise than a look at config.json and the weights suggests."""

from __future__ import annotations

import json
import shutil

import numpy as np

from tests.checks import surgery
from tests.checks.folder_cases import COPY, EMBEDDER, NVFP4, QUERY, in_text
from tests.checks.registry import STRUCTURE, case
from tests.checks.surgery import Raw

TEXT, SHARDS = "text-reranker/copy", "reranker-shards/copy"
QUANTIZATION = "quantization_config"
EMBEDDING = "model.language_model.embed_tokens.weight"


# Two sources of one thing.


@case(STRUCTURE, "safetensors-two-weights", SHARDS)
def stale_single_file(folder, builder):
    """A stale model.safetensors lies beside the shards; transformers takes it"""
    shutil.copyfile(builder.good(COPY) / "model.safetensors", folder / "model.safetensors")


@case(STRUCTURE, "safetensors-two-weights", COPY, NVFP4)
def extra_weights(folder):
    """A second weight file without an index; vLLM and SGLang load both"""
    shutil.copyfile(folder / "model.safetensors", folder / "rerank-head.safetensors")


@case(STRUCTURE, "safetensors-two-weights", COPY)
def consolidated_weights(folder):
    """consolidated.safetensors makes vLLM read Mistral's layout"""
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")


@case(STRUCTURE, "safetensors-two-weights", NVFP4)
def weights_named_in_the_config(folder):
    """config.json names another weight file for transformers"""
    shutil.copyfile(folder / "model.safetensors", folder / "old.safetensors")
    surgery.config(folder, lambda config: config.update(transformers_weights="old.safetensors"))


@case(STRUCTURE, "safetensors-untied-head", COPY)
def tied_model_with_a_head(folder):
    """A tied model stores another lm_head, which transformers unties it for"""
    surgery.weights(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].holding(t[EMBEDDING].data[::-1])}))


@case(STRUCTURE, "other-tying", COPY, NVFP4)
def untied_in_the_text_config(folder):
    """text_config says that the head is not tied"""
    in_text(folder, tie_word_embeddings=False)


@case(STRUCTURE, "other-tying", NVFP4)
def tying_only_in_the_text_config(folder):
    """tie_word_embeddings has moved into text_config, where transformers does not look"""
    surgery.config(folder, lambda config: config.pop("tie_word_embeddings"))
    in_text(folder, tie_word_embeddings=True)


def processor(folder, **parts):
    """Write a processor_config.json as transformers 5 does, with the artefact's own settings but for `parts`."""
    own = {
        "image_processor": surgery.read_json(folder / "preprocessor_config.json"),
        "video_processor": surgery.read_json(folder / "video_preprocessor_config.json"),
    }
    for kind, changes in parts.items():
        own[kind] |= changes
    (folder / "processor_config.json").write_text(json.dumps(own))


@case(STRUCTURE, "other-side-file", NVFP4, COPY)
def second_image_processor(folder):
    """processor_config.json, which engines prefer, limits pictures to less"""
    processor(folder, image_processor={"size": {"shortest_edge": 4096, "longest_edge": 65536}})


@case(STRUCTURE, "other-side-file", NVFP4)
def second_video_processor(folder):
    """processor_config.json normalizes videos otherwise"""
    processor(folder, video_processor={"image_mean": [0.48, 0.45, 0.4]})


@case(STRUCTURE, "other-side-file", NVFP4)
def second_chat_template(folder):
    """tokenizer_config.json has another chat template, which llama.cpp's converter prefers"""
    surgery.edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template="{{ messages }}"))


@case(STRUCTURE, "other-side-file", NVFP4)
def template_of_the_processor(folder):
    """chat_template.json, which processors prefer, holds another chat template"""
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))


@case(STRUCTURE, "added-side-file", NVFP4)
def additional_chat_template(folder):
    """A second, named chat template keeps SGLang from finding the first"""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rerank.jinja").write_text("{{ query }}{{ document }}")


@case(STRUCTURE, "other-side-file", NVFP4)
def lengths_under_another_name(folder):
    """sentence_bert_config.json has become sentence_roberta_config.json with a limit of 64 tokens"""
    config = surgery.read_json(folder / "sentence_bert_config.json") | {"max_seq_length": 64}
    (folder / "sentence_bert_config.json").unlink()
    (folder / "sentence_roberta_config.json").write_text(json.dumps(config))


@case(STRUCTURE, "other-rope", COPY)
def two_rotary_embeddings(folder):
    """rope_scaling, which transformers prefers, stands beside rope_parameters with another base"""
    rope = surgery.read_json(folder / "config.json")["text_config"]["rope_parameters"]
    in_text(folder, rope_scaling=rope | {"rope_theta": 1e4})


@case(STRUCTURE, "added-side-file", NVFP4)
def sentencepiece_tokenizer(folder):
    """A tokenizer.model lies beside tokenizer.json; llama.cpp's converter takes it"""
    (folder / "tokenizer.model").write_bytes(b"\x0a\x07")


# The tokenizer as engines build it.


def tokenizer_config(folder, **changes):
    """Change tokenizer_config.json."""
    surgery.edit(folder / "tokenizer_config.json", lambda config: config.update(changes))


@case(STRUCTURE, "other-tokenizer-class", NVFP4, COPY)
def tokenizer_of_another_class(folder):
    """The tokenizer's class is LlamaTokenizer"""
    tokenizer_config(folder, tokenizer_class="LlamaTokenizer")


@case(STRUCTURE, "other-token-list", NVFP4)
def added_tokens_renumbered(folder):
    """added_tokens_decoder has exchanged two tokens"""

    def change(config):
        decoder = config["added_tokens_decoder"]
        decoder["754"], decoder["755"] = decoder["755"], decoder["754"]

    surgery.edit(folder / "tokenizer_config.json", change)


@case(STRUCTURE, "other-token-list", NVFP4)
def added_token_swallows_spaces(folder):
    """added_tokens_decoder lets a token swallow the space behind it"""
    surgery.edit(
        folder / "tokenizer_config.json", lambda config: config["added_tokens_decoder"]["755"].update(rstrip=True)
    )


@case(STRUCTURE, "other-token-list", COPY)
def added_token_left_out(folder):
    """added_tokens_decoder lacks a token that tokenizer.json has"""
    surgery.edit(folder / "tokenizer_config.json", lambda config: config["added_tokens_decoder"].pop("770"))


@case(STRUCTURE, "other-truncation", NVFP4, EMBEDDER)
def short_texts_only(folder):
    """model_max_length cuts every text at 128 tokens"""
    tokenizer_config(folder, model_max_length=128)


@case(STRUCTURE, "other-tokenizer-rules", NVFP4)
def special_tokens_split(folder):
    """split_special_tokens makes plain text of every special token"""
    tokenizer_config(folder, split_special_tokens=True)


@case(STRUCTURE, "other-tokenizer-rules", NVFP4)
def prefix_space(folder):
    """add_prefix_space puts a space before every text"""
    tokenizer_config(folder, add_prefix_space=True)


@case(STRUCTURE, "other-ids", NVFP4)
def token_invented(folder):
    """tokenizer_config.json names an extra special token for an ordinary word"""
    tokenizer_config(folder, additional_special_tokens=None, extra_special_tokens=["yes or no"])


@case(STRUCTURE, "tokenizer-refused", NVFP4)
def tokenizer_config_that_transformers_refuses(folder):
    """extra_special_tokens is a number, so that transformers cannot build the tokenizer"""
    tokenizer_config(folder, extra_special_tokens=7)


# Files that change behaviour by being there.


@case(STRUCTURE, "safetensors-adapter", COPY, NVFP4)
def unmerged_adapter(folder):
    """An adapter was left in the folder and not merged"""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))


@case(STRUCTURE, "safetensors-own-code", COPY)
def model_code_in_the_folder(folder):
    """config.json names code of the folder as the model"""
    surgery.config(folder, lambda config: config.update(auto_map={"AutoModel": "modeling.Model"}))
    (folder / "modeling.py").write_text("raise SystemExit\n")


@case(STRUCTURE, "safetensors-own-code", NVFP4)
def tokenizer_code_in_the_folder(folder):
    """tokenizer_config.json names code of the folder as the tokenizer"""
    tokenizer_config(folder, auto_map={"AutoTokenizer": ["tokenization.T", None]})


@case(STRUCTURE, "added-side-file", EMBEDDER)
def another_module(folder):
    """A dense layer follows the pooling"""
    (folder / "3_Dense").mkdir()
    (folder / "3_Dense/config.json").write_text(json.dumps({"in_features": 64, "out_features": 64}))
    path = folder / "modules.json"
    entry = {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    path.write_text(json.dumps([*surgery.read_json(path), entry]))


# Declarations that the stored bytes do not honour.


def declare(folder, **changes):
    """Change quantization_config."""
    surgery.config(folder, lambda config: config[QUANTIZATION].update(changes))


@case(STRUCTURE, "nvfp4-declaration", NVFP4)
def declared_fp8(folder):
    """config.json says FP8 of NVFP4 weights"""
    declare(folder, quant_algo="FP8")


@case(STRUCTURE, "nvfp4-declaration", NVFP4)
def declared_w4a4(folder):
    """config.json says that activations are quantized, too, and there is no scale for them"""
    declare(folder, quant_algo="NVFP4")
    surgery.edit(folder / "hf_quant_config.json", lambda config: config["quantization"].update(quant_algo="NVFP4"))


@case(STRUCTURE, "nvfp4-declaration", NVFP4)
def declared_compressed_tensors(folder):
    """config.json says compressed-tensors of ModelOpt's layout"""
    declare(folder, quant_method="compressed-tensors", quant_algo=None)


@case(STRUCTURE, "nvfp4-declaration", COPY)
def declared_and_plain(folder):
    """config.json says GPTQ of plain weights"""
    surgery.config(folder, lambda config: config.update({QUANTIZATION: {"quant_method": "gptq", "bits": 4}}))


@case(STRUCTURE, "nvfp4-declaration", COPY)
def declared_in_the_text_config(folder):
    """text_config, where vLLM looks last, declares a quantization"""
    in_text(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})


@case(STRUCTURE, "nvfp4-kv-cache", NVFP4)
def key_value_cache_without_scales(folder):
    """The key-value cache is to be quantized to FP8, and its scales are missing"""
    declare(folder, kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False})


@case(STRUCTURE, "nvfp4-kv-cache", NVFP4)
def key_value_cache_in_hf_quant_config(folder):
    """hf_quant_config.json has a quantized key-value cache without scales"""
    path = folder / "hf_quant_config.json"
    surgery.edit(path, lambda config: config["quantization"].update(kv_cache_quant_algo="FP8"))


@case(STRUCTURE, "nvfp4-bad-scale", NVFP4)
def key_value_cache_with_a_scale_of_zero(folder):
    """A scale of the quantized key-value cache is 0"""
    scale = Raw("F32", np.array(0, np.uint32))
    surgery.weights(folder, lambda tensors: tensors.update({QUERY.replace("q_proj", "k_proj") + ".k_scale": scale}))
    surgery.edit(
        folder / "hf_quant_config.json", lambda config: config["quantization"].update(kv_cache_quant_algo="FP8")
    )


@case(STRUCTURE, "nvfp4-scheme", NVFP4)
def wrong_number_of_bits(folder):
    """config_groups says 8 bits"""
    group_weights(folder, num_bits=8)


def group_weights(folder, **changes):
    """Change the weights of the first group."""
    surgery.config(folder, lambda config: config[QUANTIZATION]["config_groups"]["group_0"]["weights"].update(changes))


@case(STRUCTURE, "nvfp4-scheme", NVFP4)
def integer_weights(folder):
    """config_groups says integers"""
    group_weights(folder, type="int")


@case(STRUCTURE, "nvfp4-group-size", NVFP4)
def wrong_group_size(folder):
    """config_groups says blocks of 32"""
    group_weights(folder, group_size=32)


@case(STRUCTURE, "excluded-modules-packed", NVFP4)
def excluded_by_a_part_of_the_name(folder):
    """An excluded pattern is part of packed modules' names, which vLLM takes for a match"""
    for name, section, field in (
        ("config.json", QUANTIZATION, "ignore"),
        ("hf_quant_config.json", "quantization", "exclude_modules"),
    ):
        surgery.edit(folder / name, lambda config, s=section, f=field: config[s][f].append("layers.1"))


@case(STRUCTURE, "safetensors-unknown-type", COPY)
def type_that_nothing_computes_in(folder):
    """config.json declares float8"""
    surgery.config(folder, lambda config: config.update(dtype="float8_e4m3fn"))


@case(STRUCTURE, "other-rope", COPY)
def half_rotary(folder):
    """Only half of each head is rotated"""
    rope = surgery.read_json(folder / "config.json")["text_config"]["rope_parameters"]
    in_text(folder, rope_parameters=rope | {"partial_rotary_factor": 0.5})


@case(STRUCTURE, "other-config", TEXT)
def sliding_layers(folder):
    """One layer sees only a window of the text"""
    types = ["full_attention", "sliding_attention", "full_attention"]
    surgery.config(folder, lambda config: config.update(layer_types=types, sliding_window=64, use_sliding_window=True))


@case(STRUCTURE, "other-config", COPY)
def chunked_attention(folder):
    """vLLM is told to attend in chunks"""
    in_text(folder, dual_chunk_attention_config={"chunk_size": 64})


@case(STRUCTURE, "safetensors-field-type", COPY, NVFP4)
def number_as_a_string(folder):
    """A number in config.json is a string"""
    in_text(folder, rms_norm_eps="1e-6")


@case(STRUCTURE, "safetensors-field-type", TEXT)
def size_as_a_fraction(folder):
    """A size in config.json is a fraction"""
    surgery.config(folder, lambda config: config.update(head_dim=16.0))


@case(STRUCTURE, "safetensors-field-type", COPY)
def base_as_a_list(folder):
    """The rotary base is a list"""
    rope = surgery.read_json(folder / "config.json")["text_config"]["rope_parameters"]
    in_text(folder, rope_parameters=rope | {"rope_theta": [5e6]})


# Prompt bytes.


def rewrite(folder, name, change):
    """Let `change(text)` make another text of a template."""
    path = folder / name
    path.write_bytes(change(path.read_text()).encode())


@case(STRUCTURE, "other-rerank-template", NVFP4)
def newline_before_the_prompt(folder):
    """rerank_template.jinja begins with a newline, which engines send"""
    rewrite(folder, "rerank_template.jinja", lambda text: "\n" + text)


@case(STRUCTURE, "other-rerank-template", NVFP4)
def space_behind_the_prompt(folder):
    """rerank_template.jinja ends with a space, which engines send"""
    rewrite(folder, "rerank_template.jinja", lambda text: text + " ")


@case(STRUCTURE, "other-rerank-template", NVFP4)
def two_newlines_behind_the_prompt(folder):
    """rerank_template.jinja ends with two newlines, of which Jinja drops one"""
    rewrite(folder, "rerank_template.jinja", lambda text: text + "\n\n")


@case(STRUCTURE, "other-rerank-template", NVFP4)
def sides_exchanged(folder):
    """rerank_template.jinja puts the document in the query's place"""
    swap = {"sides.query ~": "sides.document ~", "sides.document ~": "sides.query ~"}

    def change(text):
        first, last = text.rsplit("\n", 1)
        for old, new in zip(swap, ("\0", swap["sides.document ~"]), strict=True):
            last = last.replace(old, new)
        return f"{first}\n{last.replace(chr(0), swap['sides.query ~'])}"

    rewrite(folder, "rerank_template.jinja", change)


@case(STRUCTURE, "other-rerank-template", NVFP4)
def document_doubled(folder):
    """rerank_template.jinja renders the document twice"""
    rewrite(
        folder,
        "rerank_template.jinja",
        lambda text: text.replace("~ sides.document", "~ sides.document ~ sides.document"),
    )


@case(STRUCTURE, "other-rerank-template", NVFP4)
def start_token_in_the_prompt(folder):
    """rerank_template.jinja begins with a start token"""
    rewrite(folder, "rerank_template.jinja", lambda text: "<|endoftext|>" + text)


@case(STRUCTURE, "other-side-file", NVFP4)
def newline_before_the_chat_template(folder):
    """chat_template.jinja begins with a newline"""
    rewrite(folder, "chat_template.jinja", lambda text: "\n" + text)


@case(STRUCTURE, "missing-rerank-template", NVFP4, "text-reranker/nvfp4")
def rerank_template_missing(folder):
    """rerank_template.jinja is missing, which qtool.json lists"""
    (folder / "rerank_template.jinja").unlink()


@case(STRUCTURE, "missing-rerank-template", NVFP4)
def rerank_template_dangling(folder):
    """rerank_template.jinja is a link that leads nowhere"""
    (folder / "rerank_template.jinja").unlink()
    (folder / "rerank_template.jinja").symlink_to("gone.jinja")


@case(STRUCTURE, "missing-rerank-template", "text-reranker/nvfp4")
def rerank_template_never_written(folder):
    """Another tool quantized the reranker and wrote no template, and the chat template is the vision family's"""
    (folder / "rerank_template.jinja").unlink()
    (folder / "qtool.json").unlink()


@case(STRUCTURE, "safetensors-template-reference", NVFP4)
def template_that_includes_another(folder):
    """chat_template.jinja includes rerank_template.jinja, which engines cannot load"""
    (folder / "chat_template.jinja").write_text("{% include 'rerank_template.jinja' %}")


@case(STRUCTURE, "other-side-file", COPY)
def template_is_a_file_name(folder):
    """tokenizer_config.json names the template's file where the template belongs"""
    (folder / "chat_template.jinja").rename(folder / "rerank.jinja")
    tokenizer_config(folder, chat_template="rerank.jinja")


@case(STRUCTURE, "nvfp4-scale-shape", NVFP4)
def global_scale_of_two(folder):
    """A global scale holds two values"""

    def change(tensors):
        name = f"{QUERY}.weight_scale_2"
        tensors[name] = Raw("F32", np.repeat(tensors[name].data.reshape(1), 2))

    surgery.weights(folder, change)
