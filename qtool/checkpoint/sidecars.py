"""The files beside the weights: what else a checkpoint needs to be loaded, tokenized and scored.

Rule: they are carried byte for byte. What we make ourselves (config, weights, index, quantization files) is not carried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SIDECAR_PATTERNS: Final = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
    "chat_template.*", "additional_chat_templates/**/*",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "generation_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/**/*",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Glob patterns, relative to the checkpoint's folder."""


def find_sidecars(directory: Path) -> list[Path]:
    """Paths of the side files in `directory`, relative to it, sorted."""
    found = {path for pattern in SIDECAR_PATTERNS for path in directory.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(directory) for path in found)
