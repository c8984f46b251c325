"""The table of all known families, and how one is found by the names that files give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qtool.arch.family import Family
from qtool.arch.prompts import TEXT_RERANKER, PromptSpec
from qtool.arch.qwen3 import QWEN3
from qtool.arch.qwen3_vl import QWEN3_VL
from qtool.arch.spec import Architecture

FAMILIES: Final[dict[str, Family]] = {family.key: family for family in (QWEN3, QWEN3_VL)}
"""Every family by its key. A new one is added here and nowhere else."""

SEEN_IN: Final = "b11549"
"""The newest llama.cpp that was seen to ignore the scales that `Family.ignored_scales` matches."""

UPSTREAM_RERANKER: Final = TEXT_RERANKER
"""The prompt that llama.cpp's converter gives to every reranker, whatever its family."""


def architectures() -> Mapping[str, Architecture]:
    """Every known value of `architectures` in config.json."""
    return {each.name: each for family in FAMILIES.values() for each in family.architectures}


def gguf_families() -> Mapping[str, Family]:
    """Every family by its value of `general.architecture` in GGUF files."""
    return {family.gguf_architecture: family for family in FAMILIES.values()}


def reranker_prompts() -> tuple[PromptSpec, ...]:
    """The official reranker prompts, each once."""
    return tuple(dict.fromkeys(family.reranker for family in FAMILIES.values()))
