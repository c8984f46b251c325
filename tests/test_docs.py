"""The documentation stays true: generated pages are fresh, links lead somewhere, commands and files exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from qtool.recipe import parse_recipe
from tests.docs_pages import COMMANDS, help_of
from tests.docs_pages import PAGES as GENERATED

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "recipes" / "README.md"])
MAKEFILE = (ROOT / "Makefile").read_text()


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_fresh(name):
    assert (ROOT / "docs" / name).read_text() == GENERATED[name](), "run `make docs`"


@cache
def options_of(command):
    return set(re.findall(r"--?[a-z][\w-]*", help_of(command)))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_exist(page):
    examples = "".join(re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(), re.DOTALL))
    for line in re.findall(r"^qtool .*$", examples, re.MULTILINE):
        command = line.split()[1]
        assert command in COMMANDS, line
        for option in re.findall(r"(?<= )--?[a-z][\w-]*", line.partition("#")[0]):
            assert option in options_of(command), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page):
    for target in re.findall(r"`make ([a-z-]+)", page.read_text()):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_map_names_every_package():
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "qtool").iterdir():
        is_package = path.is_dir() and (path / "__init__.py").exists()
        if path.name != "__main__.py" and (path.suffix == ".py" or is_package):
            assert re.search(rf"^  {path.name}/? ", architecture, re.MULTILINE), path.name


def test_the_recipe_in_the_docs_is_valid():
    text = (ROOT / "docs" / "recipes.md").read_text()
    (block, *_) = re.findall(r"```yaml\n(name: .*?)```", text, re.DOTALL)
    assert parse_recipe(block).recipe.name == "mine"


def test_every_dependency_is_pinned():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    }
    section = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    for name in re.findall(r'^\s*"([\w-]+)', section[1], re.MULTILINE):
        assert name.lower().replace("_", "-") in pinned, name
