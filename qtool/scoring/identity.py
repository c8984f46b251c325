"""Hashes of what a score depends on: a model's files and a prompt's rules.

Rule: a file that cannot change a score is not in the hash, so that a new README leaves cached scores valid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qtool.inputs.limits import OFFICIAL_LIMITS

if TYPE_CHECKING:
    from qtool.arch.prompts import PromptSpec

_DECISIVE: Final = (
    "*.safetensors",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_LogitScore/config.json",
)

_SMALL: Final = 1 << 26


def checkpoint_sha256(directory: Path) -> str:
    """Of the weights, config, tokenizer and declared answer tokens in `directory`."""
    return files_sha256(sorted({path for pattern in _DECISIVE for path in directory.glob(pattern)}))


def files_sha256(paths: Sequence[Path]) -> str:
    """Of these files' contents, in this order."""
    return _sha256(_digests(paths))


def _digests(paths: Sequence[Path]) -> list[str]:
    if sum(path.stat().st_size for path in paths) < _SMALL:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    from qtool.checkpoint.hashing import sha256_of  # its kernels take a second to load

    return sha256_of(paths)


def prompt_sha256(prompt: PromptSpec, *more: str) -> str:
    """Of a prompt's rules, the official pixel limits, and `more` that shapes what the model reads."""
    return _sha256([asdict(prompt), asdict(OFFICIAL_LIMITS), more])


def _sha256(value: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
