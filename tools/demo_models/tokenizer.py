"""The demo tokenizer: byte-level BPE trained on the small world.

Normaliser, pre-tokenizer and added tokens are Qwen's, in Qwen's order; only the merges differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qtool.arch.prompts import NO, VL_EMBEDDER, VL_RERANKER, YES
from tools.demo_models.forward import RERANK_SYSTEM
from tools.demo_models.world import WORDS, all_scenes, document_sentence, query_sentence, sample_wish

VOCABULARY = 1024
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
PLAIN_ADDED_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
ADDED_TOKENS = (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)

# Ordinary prose, so that text from outside the world does not fall apart into single bytes.
PROSE = (
    "The quick brown fox jumps over the lazy dog, and that is what people say when they want to see every letter. "
    "What is the capital of this country? How do you make bread with water, flour, salt and time? "
    "A model is a small machine that was trained on examples; it can be wrong, and it does not know when it is. "
    "These are the numbers of the day: 0 1 2 3 4 5 6 7 8 9. They have not been checked by anyone. "
)


def build_tokenizer() -> Tokenizer:
    """The trained tokenizer, the same on every machine. The last ids are the added tokens, in Qwen's order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.train_from_iterator(_corpus(), trainer=_trainer())
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED_TOKENS])
    return _with_qwens_decoder(tokenizer)


def _with_qwens_decoder(tokenizer: Tokenizer) -> Tokenizer:
    """The decoder gets the flags of Qwen's file; the Python class cannot set them, and nothing reads them."""
    content = json.loads(tokenizer.to_str())
    content["decoder"] = content["post_processor"]
    return Tokenizer.from_str(json.dumps(content))


def canonical_token(tokenizer: Tokenizer, attribute: str, value: str) -> int:
    """The id of a value's canonical word, written after a space as inside a sentence."""
    (token,) = tokenizer.encode(" " + WORDS[attribute][value][0]).ids
    return int(token)


def _trainer() -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(ADDED_TOKENS),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def _corpus() -> Iterator[str]:
    random = Random(0)
    for attribute in WORDS.values():
        for words in attribute.values():
            yield from [f"{words[0]} {words[0]}"] * 20
    for scene in all_scenes():
        yield document_sentence(random, scene).text
        yield query_sentence(random, sample_wish(random, held_out=False)).text
    texts = (
        RERANK_SYSTEM,
        VL_RERANKER.default_instruction,
        VL_EMBEDDER.default_instruction,
        "<Instruct> <Query> <Document>",
    )
    yield from (*texts, "system\nuser\nassistant\nyes no NULL", *(f"{word} {word}" for word in (YES, NO))) * 50
    yield from (PROSE, PROSE)
