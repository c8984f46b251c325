"""A tokenizer of full size that means nothing: 151,669 tokens and as many merges as the real one has."""

from __future__ import annotations

import json
from itertools import islice, product
from pathlib import Path

from qtool import resources

_MERGES = 151_000


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write tokenizer.json and its side files: the demo tokenizer's rules and special tokens, more words; the ids of all."""
    demo = resources.demo_model("qtool-demo-reranker")
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    letters = [token for token in tokenizer["model"]["vocab"] if len(token) == 1]
    pairs = [(a, b) for a, b in product(letters, letters)]
    triples = ((a + b, c) for (a, b), c in product([("y", "e"), *pairs], ["s", *letters]))
    merges = list(dict.fromkeys([*pairs, *islice(triples, _MERGES)]))[:_MERGES]
    words = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    vocabulary = {word: number for number, word in enumerate(words)}
    for number, token in enumerate(tokenizer["added_tokens"], start=len(vocabulary)):
        token["id"] = number
    tokenizer["model"] |= {"vocab": vocabulary, "merges": [list(pair) for pair in merges]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    modules = [{"idx": 0, "name": "0", "path": "1_LogitScore", "type": "sentence_transformers.LogitScore"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    # Declared, since these merges split "yes" in two.
    (folder / "1_LogitScore").mkdir(exist_ok=True)
    answers = {"true_token_id": vocabulary["yes"], "false_token_id": vocabulary["no"]}
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(answers))
    return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
