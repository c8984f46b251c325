"""Recipes: which modules become which format, why the others stay, and what loss is tolerated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qtool import resources
from qtool.errors import UsageError, reason
from qtool.jsonfile import read_bounded

NonEmpty = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):  # an unknown key is an error
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Keep(_Strict):
    """Modules that stay as they are. Patterns are shell-style, on module names such as `model.layers.0.mlp.up_proj`.

    `groups` instead of `modules` are patterns on fused groups, such as `model.layers.0.mlp.gate_up_proj`; they take
    groups, always whole, out of what `quantize` claims.
    """

    modules: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    groups: Annotated[list[NonEmpty], Field(min_length=1)] | None = None
    reason: NonEmpty

    @model_validator(mode="after")
    def _names_one_kind(self) -> Keep:
        if (self.modules is None) == (self.groups is None):
            raise ValueError("expected either modules or groups")
        return self

    @property
    def patterns(self) -> list[str]:
        """Of modules or groups."""
        return self.modules or self.groups or []


class Bound(_Strict):
    """The range that a metric must lie in for a gate to pass; either end may be open."""

    min: Finite | None = None
    max: Finite | None = None

    @model_validator(mode="after")
    def _holds_something(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs a min or a max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min is greater than max")
        return self


class CalibrationSpec(_Strict):
    """How weights are fitted to data: the effort, and the number of tokens of the data that are read at most."""

    effort: Literal["fast", "standard", "best"] = "standard"
    tokens: Annotated[int, Field(ge=1)] = 65_536


class Recipe(_Strict):
    """A quantization recipe; `gates` maps metric names of the verification to the bounds they must keep."""

    name: NonEmpty
    description: NonEmpty
    scheme: Literal["W4A16_NVFP4"]
    block_size: Literal[16]
    algorithm: Literal["max", "mse", "four-over-six", "calibrated"]
    calibration: CalibrationSpec | None = None
    quantize: Annotated[list[NonEmpty], Field(min_length=1)]
    keep: list[Keep]
    gates: Mapping[str, Bound] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_how(self) -> Recipe:
        if (self.calibration is not None) != (self.algorithm == "calibrated"):
            raise ValueError("`calibration` and the algorithm `calibrated` belong together")
        return self


class LoadedRecipe(BaseModel):
    """A recipe, its text and where that came from; text and hash go into every artefact."""

    model_config = ConfigDict(frozen=True)

    recipe: Recipe
    text: str
    origin: str

    @property
    def sha256(self) -> str:
        """Hex digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


_FOLDER: Final = "recipes"
_MAX_BYTES: Final = 1 << 20
_DEEPEST: Final = 50
"""Levels of nesting; a recipe has four."""


def builtin_recipes() -> list[str]:
    """Names of the recipes that come with qtool."""
    return resources.names(_FOLDER, ".yaml")


def load_recipe(name_or_path: str) -> LoadedRecipe:
    """A built-in recipe by name, or a file by path (anything with a suffix or a slash)."""
    path = Path(name_or_path)
    if not path.suffix and len(path.parts) == 1:
        if name_or_path not in builtin_recipes():
            raise UsageError(f"No recipe is called {name_or_path!r}.", f"Known are {', '.join(builtin_recipes())}.")
        path = resources.path(f"{_FOLDER}/{name_or_path}.yaml")
    try:
        text = read_bounded(path, _MAX_BYTES, may_be_pipe=True).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The recipe {name_or_path} cannot be read: {reason(error)}.") from None
    return parse_recipe(text, name_or_path)


def parse_recipe(text: str, origin: str = "recipe") -> LoadedRecipe:
    """The recipe in a YAML `text`; `origin` names it in errors."""
    document = read_yaml(text, origin)
    try:
        return LoadedRecipe(recipe=Recipe.model_validate(document), text=text, origin=origin)
    except ValidationError as error:
        raise UsageError(f"{origin} is not a valid recipe: {_first_problem(error)}", "See docs/recipes.md.") from None


def read_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text of at most a megabyte, without anchors. Raises UsageError, and nothing else, for any text."""
    if len(text) > _MAX_BYTES:
        raise UsageError(f"{origin} has more than {_MAX_BYTES:,} characters.")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{origin} is not valid YAML{place}: {error.problem or error.context}.") from None
    except RecursionError:
        raise UsageError(f"{origin} is not valid YAML: it is nested too deeply.") from None
    except Exception as error:  # noqa: BLE001 - PyYAML's constructors of numbers and dates raise errors of any kind
        raise UsageError(f"{origin} is not valid YAML: {' '.join(reason(error).split())}.") from None


class _Loader(yaml.SafeLoader):
    """YAML as JSON has it: texts, numbers, booleans, lists and mappings; a date is a text.

    An anchor is refused, since a few lines of anchors stand for billions of values.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's, which would follow an alias."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def fetch_more_tokens(self) -> Any:
        """As PyYAML's, within a depth that its recursion can follow."""
        if self.flow_level + len(self.indents) > _DEEPEST:
            raise RecursionError
        return super().fetch_more_tokens()


_PLAIN: Final = ("bool", "float", "int", "null")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] in _PLAIN]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the document"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {problem['msg']}{more}."
