"""tokenizer.json of a checkpoint, and the ids of the answers that its rank head names.

Rule: what cannot be looked into is not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from qtool.arch.prompts import NO, YES
from qtool.arch.spec import Task
from qtool.convert.tokenizer import QWEN2_SPLIT
from qtool.inspection.checkpoint_model import TOKENIZER, CheckpointModel, as_mapping
from qtool.inspection.finding import Finding
from qtool.jsonfile import read_json

_HEAD: Final = "LogitScore"


def tokenizer_findings(model: CheckpointModel) -> Iterator[Finding]:
    """Whether text is split as in training and the answers are single tokens, the ones that the head takes."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return
    if _split_pattern(tokenizer) != QWEN2_SPLIT:
        yield model.found("safetensors-pre-tokenizer", name=TOKENIZER)
    if model.detection.task is Task.RERANK:
        yield from _answer_findings(model, tokenizer)


def pre_tokenizer(model: CheckpointModel) -> str:
    """How text is split, for people."""
    if model.tokenizer is None:
        return "not read" if TOKENIZER in model.names else "missing"
    return "qwen2" if _split_pattern(model.tokenizer) == QWEN2_SPLIT else "other"


def _split_pattern(tokenizer: Mapping[str, Any]) -> str | None:
    declared = as_mapping(tokenizer.get("pre_tokenizer"))
    several = declared.get("pretokenizers")
    steps = [as_mapping(step) for step in several] if isinstance(several, list) else [declared]
    patterns = [as_mapping(step.get("pattern")).get("Regex") for step in steps if step.get("type") == "Split"]
    return patterns[0] if len(patterns) == 1 else None


def _answer_findings(model: CheckpointModel, tokenizer: Mapping[str, Any]) -> Iterator[Finding]:
    vocabulary = as_mapping(as_mapping(tokenizer.get("model")).get("vocab"))
    missing = [word for word in (YES, NO) if word not in vocabulary]
    for word in missing:
        yield model.found("safetensors-no-yes-no-token", word=word, name=TOKENIZER)
    for name in () if missing else model.names:
        if name.endswith(f"_{_HEAD}/config.json"):
            head = read_json(model.checkpoint.directory / name)
            found, expected = [head.get("true_token_id"), head.get("false_token_id")], [vocabulary[YES], vocabulary[NO]]
            if found != expected:
                yield model.found("safetensors-answer-ids", path=name, found=found, expected=expected, name=name)
