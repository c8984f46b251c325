"""The recipe that tuning finds, as YAML: its base, the groups that stay with what each costs, and how they were found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import yaml

from qtool.calibration.choice import Candidate, Level
from qtool.export.quantize_plan import PlannedTensor
from qtool.recipe import Recipe

RECIPE: Final = "recipe.yaml"
TENSOR_TYPES: Final = "tensor-types.txt"
"""Types of llama.cpp for the same budget, as its --tensor-type-file takes them."""


def recipe_text(base: Recipe, name: str, kept: Sequence[Candidate], unit: str, about: Sequence[str] = ()) -> str:
    """`base` with the groups `kept`; `unit` is what their drift is measured in, `about` are lines of comment."""
    document = _plain(base.model_dump(exclude_none=True, exclude_defaults=False))
    document |= {"name": name, "description": f"{base.name} with {len(kept)} fused groups left as they are"}
    document["keep"] = [*(_kept(each, unit) for each in kept), *document["keep"]]
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    return "".join(f"# {line}\n" for line in about) + text


def _kept(each: Candidate, unit: str) -> Mapping[str, Any]:
    more = 8 * (each.kept_bytes - each.quantized_bytes) / 1e6
    reason = f"rounded alone it moves the {unit} by {each.centred:.4g} (RMS, centred; raw {each.raw:.4g}); costs {more:.4g} Mbit"
    return {"groups": [each.group], "reason": reason}


def plain_max(recipe: Recipe) -> Recipe:
    """The same recipe with `max` rounding, which needs no data."""
    return recipe.model_copy(update={"algorithm": "max", "calibration": None})


def tensor_types(
    groups: Mapping[str, Sequence[PlannedTensor]], types: Mapping[str, Level], names: Callable[[str], str | None]
) -> Iterator[str]:
    """A line `PATTERN=TYPE` for each matrix; the pattern is a regular expression that no other name fits."""
    for group, members in groups.items():
        for member in members:
            yield f"^{re.escape(str(names(member.spec.hf_name)))}$={types[group].name}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
