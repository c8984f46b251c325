"""Checkpoints that headers and small files alone condemn."""

from __future__ import annotations

import shutil

import numpy as np

from qtool.arch.prompts import TEXT_RERANKER, rerank_template
from tests.checks import surgery
from tests.checks.registry import STRUCTURE, case
from tests.checks.surgery import Raw

COPY, NVFP4, EMBEDDER, TEXT = "reranker/copy", "reranker/nvfp4", "embedder/nvfp4", "text-reranker/nvfp4"
LAYER = "model.language_model.layers.1."
QUERY = f"{LAYER}self_attn.q_proj"


def in_text(folder, **changes):
    """Change config.json's text_config."""
    surgery.config(folder, lambda config: config["text_config"].update(changes))


@case(STRUCTURE, "missing-head", TEXT, "text-reranker/copy")
def head_missing(folder):
    """lm_head.weight is missing and nothing is tied"""
    surgery.weights(folder, lambda tensors: tensors.pop("lm_head.weight"))


@case(STRUCTURE, "nvfp4-quantized-head", TEXT)
def head_in_four_bits(folder):
    """lm_head is packed"""
    surgery.weights(folder, lambda tensors: pack(tensors, "lm_head"))


@case(STRUCTURE, "nvfp4-quantized-head", NVFP4)
def vision_tower_quantized(folder):
    """A matrix of the vision tower is packed"""
    surgery.weights(folder, lambda tensors: pack(tensors, "model.visual.blocks.0.attn.qkv"))


def pack(tensors, module):
    """Put packed zeros in the place of a weight."""
    rows, columns = tensors[f"{module}.weight"].data.shape
    tensors[f"{module}.weight"] = Raw("U8", np.zeros((rows, columns // 2), np.uint8))
    tensors[f"{module}.weight_scale"] = Raw("F8_E4M3", np.full((rows, columns // 16), 0x38, np.uint8))
    tensors[f"{module}.weight_scale_2"] = Raw("F32", np.array(1, np.float32))


@case(STRUCTURE, "safetensors-answer-ids", NVFP4)
def answers_exchanged(folder):
    """1_LogitScore takes the token of no for yes"""

    def change(head):
        head["true_token_id"], head["false_token_id"] = head["false_token_id"], head["true_token_id"]

    surgery.edit(folder / "1_LogitScore/config.json", change)


@case(STRUCTURE, "nvfp4-unequal-scales", NVFP4)
def fused_scales_unequal(folder):
    """q, k and v do not share one global scale"""

    def change(tensors):
        name = f"{QUERY}.weight_scale_2"
        tensors[name] = tensors[name].holding(tensors[name].data * 2)

    surgery.weights(folder, change)


@case(STRUCTURE, "nothing-quantized", COPY)
def declared_and_not_quantized(folder, builder):
    """config.json says NVFP4, the weights are bf16"""
    for name in ("config.json", "hf_quant_config.json"):
        shutil.copyfile(builder.good(NVFP4) / name, folder / name)


def exclude(folder, old, new):
    """Replace one excluded pattern in both files."""
    patterns = [
        new if pattern == old else pattern
        for pattern in surgery.read_json(folder / "config.json")[QUANTIZATION]["ignore"]
    ]
    surgery.config(folder, lambda config: config[QUANTIZATION].update(ignore=patterns))
    surgery.edit(
        folder / "hf_quant_config.json", lambda config: config["quantization"].update(exclude_modules=patterns)
    )


QUANTIZATION = "quantization_config"


@case(STRUCTURE, "excluded-modules-pattern", NVFP4)
def pattern_that_vllm_does_not_match(folder):
    """exclude_modules names model.visual, which vLLM does not match"""
    exclude(folder, "model.visual*", "model.visual")


@case(STRUCTURE, "excluded-modules-pattern", NVFP4)
def pattern_that_sglang_does_not_match(folder):
    """exclude_modules names model.visual.*, which SGLang does not match"""
    exclude(folder, "model.visual*", "model.visual.*")


@case(STRUCTURE, "other-padding-side", NVFP4)
def padding_side_wrong(folder):
    """The tokenizer pads on the other side"""
    surgery.edit(folder / "tokenizer_config.json", lambda config: config.update(padding_side="left"))


@case(STRUCTURE, "missing-side-file", NVFP4, EMBEDDER)
def modules_json_missing(folder):
    """modules.json is missing"""
    (folder / "modules.json").unlink()


@case(STRUCTURE, "missing-side-file", NVFP4)
def chat_template_missing(folder):
    """chat_template.jinja is missing"""
    (folder / "chat_template.jinja").unlink()


@case(STRUCTURE, "other-side-file", EMBEDDER)
def chat_template_changed(folder):
    """chat_template.jinja has another system message"""
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "Be brief.")


@case(STRUCTURE, "other-side-file", NVFP4)
def instruction_changed(folder):
    """sentence-transformers is given another instruction"""
    path = folder / "config_sentence_transformers.json"
    surgery.edit(path, lambda config: config["prompts"].update(query="Find pictures of birds."))


@case(STRUCTURE, "other-rerank-template", NVFP4)
def text_template_for_vllm(folder):
    """rerank_template.jinja renders the text reranker's prompt"""
    (folder / "rerank_template.jinja").write_text(rerank_template(TEXT_RERANKER))


@case(STRUCTURE, "other-side-file", NVFP4)
def preprocessor_of_another_model(folder):
    """Pictures are cut into larger patches"""
    surgery.edit(folder / "preprocessor_config.json", lambda config: config.update(patch_size=14))


@case(STRUCTURE, "safetensors-pooling", EMBEDDER)
def pooling_mean(folder):
    """1_Pooling takes the mean"""
    surgery.edit(folder / "1_Pooling/config.json", lambda config: config.update(pooling_mode="mean"))


@case(STRUCTURE, "other-tokenizer", NVFP4)
def tokenizer_of_another_model(folder):
    """The vocabulary is another one"""

    def change(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        tokenizer["model"]["vocab"] = dict(zip(vocabulary, [*list(vocabulary.values())[1:], 0], strict=True))

    surgery.edit(folder / "tokenizer.json", change)


@case(STRUCTURE, "added-token-missing", NVFP4)
def added_token_dropped(folder):
    """The tokenizer has lost an added token"""

    def change(tokenizer):
        tokenizer["added_tokens"] = [each for each in tokenizer["added_tokens"] if each["content"] != "<|box_start|>"]

    surgery.edit(folder / "tokenizer.json", change)


@case(STRUCTURE, "other-tokenizer-rules", NVFP4)
def normalizer_lost(folder):
    """The tokenizer no longer normalizes"""
    surgery.edit(folder / "tokenizer.json", lambda tokenizer: tokenizer.update(normalizer=None))


@case(STRUCTURE, "other-rope", NVFP4)
def rope_theta_wrong(folder):
    """The rotary base is ten times too small"""
    rope = surgery.read_json(folder / "config.json")["text_config"]["rope_parameters"]
    in_text(folder, rope_parameters=rope | {"rope_theta": rope["rope_theta"] / 10})


@case(STRUCTURE, "other-rope", COPY)
def mrope_sections_wrong(folder):
    """Time and height have exchanged their frequencies"""
    rope = surgery.read_json(folder / "config.json")["text_config"]["rope_parameters"]
    time, height, width = rope["mrope_section"]
    in_text(folder, rope_parameters=rope | {"mrope_section": [height, time, width]})


@case(STRUCTURE, "other-epsilon", NVFP4)
def rms_epsilon_wrong(folder):
    """The norms' epsilon is ten times too large"""
    in_text(folder, rms_norm_eps=1e-5)


@case(STRUCTURE, "other-deepstack", NVFP4)
def deepstack_count_zero(folder):
    """No vision layer feeds the decoder"""
    surgery.config(folder, lambda config: config["vision_config"].update(deepstack_visual_indexes=[]))


@case(STRUCTURE, "other-deepstack", COPY)
def deepstack_from_another_layer(folder):
    """Deepstack features are taken one layer later"""
    surgery.config(folder, lambda config: config["vision_config"].update(deepstack_visual_indexes=[1]))


@case(STRUCTURE, "other-token-ids", COPY)
def image_token_wrong(folder):
    """Pictures are looked for at another token"""
    surgery.config(folder, lambda config: config.update(image_token_id=7))


@case(STRUCTURE, "other-tying", "text-reranker/copy")
def head_tied(folder):
    """The head is said to be tied to the embedding"""
    surgery.config(folder, lambda config: config.update(tie_word_embeddings=True))


@case(STRUCTURE, "other-config", COPY)
def activation_wrong(folder):
    """The decoder's activation is GELU"""
    in_text(folder, hidden_act="gelu")


@case(STRUCTURE, "other-size", COPY)
def head_count_wrong(folder):
    """config.json divides the width among twice as many heads"""
    in_text(folder, num_attention_heads=4, num_key_value_heads=4, head_dim=16)


@case(STRUCTURE, "missing-tensor", NVFP4)
def query_norm_dropped(folder):
    """The norm of the queries is missing in one layer"""
    surgery.weights(folder, lambda tensors: tensors.pop(f"{LAYER}self_attn.q_norm.weight"))


@case(STRUCTURE, "extra-tensor", COPY)
def biases_invented(folder):
    """Attention has biases, which the reference has not"""

    def change(tensors):
        for layer in range(3):
            for part in "qkvo":
                module = f"model.language_model.layers.{layer}.self_attn.{part}_proj"
                rows = tensors[f"{module}.weight"].data.shape[0]
                tensors[f"{module}.bias"] = Raw("BF16", np.zeros(rows, np.uint16))

    surgery.weights(folder, change)
    in_text(folder, attention_bias=True)


@case(STRUCTURE, "other-shape", COPY)
def feed_forward_pruned(folder):
    """Half of the feed-forward units were cut away"""

    def change(tensors):
        for layer in range(3):
            module = f"model.language_model.layers.{layer}.mlp."
            for part in ("gate_proj", "up_proj", "down_proj"):
                old = tensors[f"{module}{part}.weight"]
                kept = old.data[:, : old.data.shape[1] // 2] if part == "down_proj" else old.data[: len(old.data) // 2]
                tensors[f"{module}{part}.weight"] = old.holding(kept)

    surgery.weights(folder, change)
    in_text(folder, intermediate_size=64)


@case(STRUCTURE, "other-architecture", COPY)
def another_family(folder, builder):
    """It is the text family's model"""
    shutil.rmtree(folder)
    shutil.copytree(builder.good("text-reranker/copy"), folder)


@case(STRUCTURE, "unreadable", NVFP4)
def cut_off(folder):
    """The download stopped in the middle"""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
