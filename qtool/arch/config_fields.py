"""The fields of config.json that a score depends on, with transformers' defaults, and those that none depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any, Final

# Defaults are those of transformers 5.14 (models/qwen3/configuration_qwen3.py, qwen3_vl/configuration_qwen3_vl.py):
# transformers 4 and 5 spell out other ones of them. tests/arch/test_config_fields.py compares.


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # an int of hundreds of digits
        return False


_CHECKS: Final[Mapping[str, Callable[[Any], bool]]] = {
    "a positive integer": lambda value: _is_int(value) and value > 0,
    "a token id": lambda value: _is_int(value) and value >= 0,
    "a number": _is_number,
    "true or false": lambda value: isinstance(value, bool),
    "a string": lambda value: isinstance(value, str),
    "a list of strings": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "a list of layers": lambda value: isinstance(value, list) and all(map(_is_int, value)),
    "an object": lambda value: isinstance(value, Mapping),
    "anything": lambda _: True,
    "a token id or several": lambda value: all(map(_is_int, value if isinstance(value, list) else [value])),
}
COUNT, ID, NUMBER, FLAG, WORD, WORDS, LAYERS, OBJECT, ANY, IDS = _CHECKS


@dataclass(frozen=True)
class ConfigField:
    """What a field's value must be, and what stands for it where config.json leaves it out or says null."""

    kind: str
    default: Any = None

    def accepts(self, value: Any) -> bool:
        """Whether an engine can take `value`; null is a field left out."""
        return value is None or _CHECKS[self.kind](value)


ConfigFields = Mapping[str, ConfigField]

DECODER: Final[ConfigFields] = MappingProxyType({
    "model_type": ConfigField(WORD),
    "vocab_size": ConfigField(COUNT),
    "hidden_size": ConfigField(COUNT),
    "intermediate_size": ConfigField(COUNT),
    "num_hidden_layers": ConfigField(COUNT),
    "num_attention_heads": ConfigField(COUNT),
    "num_key_value_heads": ConfigField(COUNT),
    "head_dim": ConfigField(COUNT, 128),
    "max_position_embeddings": ConfigField(COUNT),
    "hidden_act": ConfigField(WORD, "silu"),
    "rms_norm_eps": ConfigField(NUMBER, 1e-6),
    "attention_bias": ConfigField(FLAG, default=False),
    "tie_word_embeddings": ConfigField(FLAG, default=False),
    "rope_parameters": ConfigField(OBJECT),
    "rope_scaling": ConfigField(OBJECT),
    "rope_theta": ConfigField(NUMBER),
    "partial_rotary_factor": ConfigField(NUMBER, 1.0),
    "use_sliding_window": ConfigField(FLAG, default=False),
    "sliding_window": ConfigField(COUNT),
    "max_window_layers": ConfigField(COUNT),
    "layer_types": ConfigField(WORDS),
    "is_causal": ConfigField(FLAG, default=True),
    "use_bidirectional_attention": ConfigField(FLAG, default=False),
    "dual_chunk_attention_config": ConfigField(OBJECT),
})  # fmt: skip
VISION: Final[ConfigFields] = MappingProxyType({
    "model_type": ConfigField(WORD),
    "depth": ConfigField(COUNT),
    "hidden_size": ConfigField(COUNT),
    "intermediate_size": ConfigField(COUNT),
    "num_heads": ConfigField(COUNT),
    "out_hidden_size": ConfigField(COUNT),
    "num_position_embeddings": ConfigField(COUNT),
    "in_channels": ConfigField(COUNT, 3),
    "patch_size": ConfigField(COUNT, 16),
    "spatial_merge_size": ConfigField(COUNT, 2),
    "temporal_patch_size": ConfigField(COUNT, 2),
    "deepstack_visual_indexes": ConfigField(LAYERS),
    "hidden_act": ConfigField(WORD, "gelu_pytorch_tanh"),
})  # fmt: skip
TOP: Final[ConfigFields] = MappingProxyType({
    "architectures": ConfigField(WORDS),
    "model_type": ConfigField(WORD),
    "tie_word_embeddings": ConfigField(FLAG, default=False),
    "text_config": ConfigField(OBJECT),
    "vision_config": ConfigField(OBJECT),
    "image_token_id": ConfigField(ID),
    "video_token_id": ConfigField(ID),
    "vision_start_token_id": ConfigField(ID),
    "vision_end_token_id": ConfigField(ID),
    "tokenizer_class": ConfigField(WORD),
    # Read by sentence-transformers' CrossEncoder: the activation of its scores.
    "sentence_transformers": ConfigField(OBJECT),
    # Read by vLLM's rerankers, which usually get them as --hf-overrides.
    "classifier_from_token": ConfigField(WORDS),
    "is_original_qwen3_reranker": ConfigField(FLAG, default=False),
    "method": ConfigField(WORD),
    "use_sep_token": ConfigField(FLAG),
    "head_dtype": ConfigField(WORD),
    # By which vLLM chooses what it applies to scores (vllm/model_executor/layers/pooler/activations.py, get_act_fn), and
    # sentence-transformers before 4.
    "problem_type": ConfigField(WORD),
    "sbert_ce_default_activation_function": ConfigField(WORD),
})  # fmt: skip

ELSEWHERE: Final = frozenset({
    "quantization_config", "compression_config", "dtype", "torch_dtype", "auto_map", "transformers_weights",
    "id2label", "label2id", "num_labels", "processor_class",
})  # fmt: skip
"""Fields that matter, but that are judged with the weights and files they are about."""

UNREAD: Final[ConfigFields] = MappingProxyType({
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ConfigField(IDS)),
    **dict.fromkeys(("initializer_range", "attention_dropout"), ConfigField(NUMBER)),
    **dict.fromkeys(("use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript"), ConfigField(FLAG)),
    **dict.fromkeys(
        ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "_attn_implementation",
         "attn_implementation", "chunk_size_feed_forward", "is_encoder_decoder", "finetuning_task", "task_specific_params",
         "keys_to_ignore_at_inference", "license", "_attn_implementation_autoset"),
        ConfigField(ANY),
    ),
    # Of any config, as transformers 4 wrote the sections of one: for text generation, encoders and TensorFlow.
    **dict.fromkeys(
        ("use_bfloat16", "tf_legacy_loss", "pruned_heads", "is_decoder", "cross_attention_hidden_size", "prefix",
         "add_cross_attention", "tie_encoder_decoder", "sep_token_id", "decoder_start_token_id", "max_length", "min_length",
         "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
         "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
         "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
         "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
         "begin_suppress_tokens"),
        ConfigField(ANY),
    ),
})  # fmt: skip
"""Fields that no score depends on, but of which transformers refuses some with a value of the wrong kind."""

NEVER_NULL: Final[Mapping[str, frozenset[str]]] = MappingProxyType({
    "": frozenset({"model_type", "tie_word_embeddings", "chunk_size_feed_forward", "is_encoder_decoder"}),
    "pictures": frozenset({"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}),
    "text_config": frozenset({
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "max_position_embeddings", "hidden_act", "rms_norm_eps", "attention_bias", "initializer_range", "attention_dropout",
        "use_cache", "chunk_size_feed_forward", "is_encoder_decoder",
    }),
    "vision_config": frozenset(VISION) - {"model_type"},
    "text": frozenset({"use_sliding_window", "max_window_layers"}),
})  # fmt: skip
"""Fields of which transformers 5 refuses null, though it may be left out: of every config, of the two sections and of the
whole of a model with pictures, and what a model of texts has besides those of `text_config`."""

# What the image and video processors of the families with pictures take where their files say nothing: the class
# attributes of transformers 5.14 (models/qwen2_vl/image_processing_qwen2_vl.py, qwen3_vl/video_processing_qwen3_vl.py).
# transformers 5 writes all of them, transformers 4 only some.

_RESIZED: Final = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
IMAGE_PROCESSOR: Final[Mapping[str, Any]] = MappingProxyType({
    **_RESIZED,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
})  # fmt: skip
VIDEO_PROCESSOR: Final[Mapping[str, Any]] = MappingProxyType({
    **_RESIZED,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "fps": 2,
    "min_frames": 4,
    "max_frames": 768,
    "do_sample_frames": True,
})  # fmt: skip
