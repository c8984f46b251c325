"""How an artefact was made, as far as its manifest or its own fields say: format, recipe, effort, calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

from qtool.arch.spec import Presence
from qtool.artefact import Artefact, CheckpointArtefact, GgufArtefact
from qtool.checks.declared import manifest_facts
from qtool.errors import QtoolError
from qtool.recipe import parse_recipe
from qtool.storage.checkpoint import named_tensors


@dataclass(frozen=True, kw_only=True)
class Made:
    """`format` is the scheme or type of file; the rest is the manifest's, and empty or None where there is none of it.

    `data` names what it was calibrated on, or the importance matrix of a GGUF file, and `tokens` is how many of it were
    read.
    """

    format: str = ""
    recipe: str = ""
    algorithm: str = ""
    effort: str = ""
    data: str = ""
    tokens: int | None = None


def made_of(artefact: Artefact | None) -> Made | None:
    """How the artefact was made; None of a server, which shows no files, and of what says nothing."""
    if artefact is None:
        return None
    facts: Mapping[str, Any] = {}
    with suppress(QtoolError):  # one that cannot be read is a finding of the stage structure
        facts = manifest_facts(artefact)
    recipe, calibration = (_mapping(facts, name) for name in ("recipe", "calibration"))
    tokens = calibration.get("tokens")
    made = Made(
        format=_format(artefact),
        recipe=_text(recipe, "name"),
        algorithm=_algorithm(_text(recipe, "text")),
        effort=_text(calibration, "effort"),
        data=_text(calibration, "name") or _text(_mapping(facts, "imatrix"), "name"),
        tokens=tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None,
    )
    return made if made != Made() else None


def weights_of(reference: CheckpointArtefact) -> int | None:
    """The number of weights of a checkpoint, a head that repeats the embedding counted once; None of what cannot be read."""
    with suppress(QtoolError):
        checkpoint = reference.checkpoint
        architecture = reference.detection.architecture
        found = named_tensors(checkpoint.tensors.values(), architecture, checkpoint.config)
        return sum(prod(info.shape) for spec, info in found.items() if spec.presence is not Presence.DUPLICATE)
    return None


def _format(artefact: Artefact) -> str:
    with suppress(QtoolError):
        if isinstance(artefact, GgufArtefact):
            return artefact.model.file_type
        config = artefact.checkpoint.config
        quantization = _mapping(config, "quantization_config")
        return (
            _text(quantization, "quant_algo")
            or _text(quantization, "quant_method")
            or _text(config, "dtype")
            or _text(config, "torch_dtype")
        )
    return ""


def _algorithm(text: str) -> str:
    with suppress(QtoolError):
        return parse_recipe(text).recipe.algorithm if text else ""
    return ""


def _mapping(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = facts.get(name)
    return found if isinstance(found, Mapping) else {}


def _text(facts: Mapping[str, Any], name: str) -> str:
    found = facts.get(name)
    return found if isinstance(found, str) else ""
