"""The recipe schema, the built-in recipes and their table."""

from __future__ import annotations

import pytest

from qtool import resources
from qtool.errors import UsageError
from qtool.recipe import builtin_recipes, load_recipe, parse_recipe

TEXT = resources.path("recipes/nvfp4-w4a16.yaml").read_text()


@pytest.mark.parametrize("name", builtin_recipes())
def test_builtin_recipes_are_valid_named_as_their_files_and_in_the_table(name):
    loaded = load_recipe(name)
    assert loaded.recipe.name == name
    assert all(keep.reason for keep in loaded.recipe.keep)
    assert f"| [`{name}`]({name}.yaml) |" in resources.path("recipes/README.md").read_text()


def test_a_file_of_ones_own_is_loaded_by_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT.replace("name: nvfp4-w4a16", "name: mine"))
    assert load_recipe(str(path)).recipe.name == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("block_size: 16", "block_size: 32"), "block_size"),
        (("algorithm: max", "algorithm: awq"), "algorithm"),
        (("algorithm: max", "algorithm: max\nextra: 1"), "extra"),
        (("    reason: it is the score", "    because: it is the score"), "reason"),
        (("scheme: W4A16_NVFP4", ""), "scheme"),
        (('modules: ["score"]', 'groups: ["score"]\n    modules: ["score"]'), "expected either modules or groups"),
        (("name: nvfp4-w4a16", "name: 7"), "name"),
        (("name: nvfp4-w4a16", "name: ["), "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_says_where(change, message):
    assert change[0] in TEXT
    with pytest.raises(UsageError, match=message):
        parse_recipe(TEXT.replace(*change))


def test_an_empty_gate_is_refused():
    head, _, _ = TEXT.partition("gates:")
    with pytest.raises(UsageError, match=r"gates\.kendall_tau"):
        parse_recipe(f"{head}gates:\n  kendall_tau: {{}}\n")


@pytest.mark.parametrize("bound", ["{max: .inf}", "{min: .nan}", "{min: 1.0, max: 0.5}"])
def test_a_gate_that_no_number_or_every_number_passes_is_refused(bound):
    head, _, _ = TEXT.partition("gates:")
    with pytest.raises(UsageError, match=r"gates\.kendall_tau"):
        parse_recipe(f"{head}gates:\n  kendall_tau: {bound}\n")


def test_a_missing_file_is_named():
    with pytest.raises(UsageError, match=r"missing\.yaml"):
        load_recipe("missing.yaml")
