"""Tiny random models of both families, written as real checkpoints. Shared by tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED = ("<tool_call>", "<think>", "</think>")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "yes no yes no",
    "system user assistant Judge whether the Document meets the requirements",
    "NULL Instruct Query",
]


def tokenizer() -> Tokenizer:
    """Byte-level BPE as Qwen builds it, with "yes" and "no" as single tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS * 4, trainer=trainer)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    return made


def write_tokenizer(directory: Path) -> Tokenizer:
    """Write the files that transformers' Qwen2Tokenizer reads."""
    made = tokenizer()
    made.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL[1:]),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def write_vl(directory: Path, *, tied: bool = True, seed: int = 0) -> Path:
    """A Qwen3-VL checkpoint in bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    made = write_tokenizer(directory)
    config = Qwen3VLConfig(
        text_config={**_text(made), "rope_parameters": _mrope(), "tie_word_embeddings": tied},
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 16,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
        image_token_id=made.token_to_id("<|image_pad|>"),
        video_token_id=made.token_to_id("<|video_pad|>"),
        vision_start_token_id=made.token_to_id("<|vision_start|>"),
        vision_end_token_id=made.token_to_id("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    return _save(Qwen3VLForConditionalGeneration, config, directory, seed)


def write_text(directory: Path, *, tied: bool = True, seed: int = 0, labels: int = 0) -> Path:
    """A Qwen3 checkpoint in bf16; with `labels`, its sequence classification form."""
    directory.mkdir(parents=True, exist_ok=True)
    made = write_tokenizer(directory)
    config = Qwen3Config(**_text(made), tie_word_embeddings=tied, **({"num_labels": labels} if labels else {}))
    config.pad_token_id = made.token_to_id("<|endoftext|>")
    return _save(Qwen3ForSequenceClassification if labels else Qwen3ForCausalLM, config, directory, seed)


def _text(made: Tokenizer) -> dict[str, object]:
    return {
        "vocab_size": made.get_vocab_size() + 5,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }


def _mrope() -> dict[str, object]:
    return {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}


def _save(model_class: type, config: object, directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():  # the default initialisation gives scores that hardly differ
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3 if "embed" in name else 1.5 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory
