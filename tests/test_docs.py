"""The documentation stays true: generated pages are fresh, links lead somewhere, commands and their output are real."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from qtool.cli import app
from qtool.recipe import parse_recipe
from qtool.verify.meanings import meaning
from qtool.verify.metrics import METRICS
from tests import docs_examples
from tests.docs_pages import COMMANDS, EXIT_CODES, help_of
from tests.docs_pages import PAGES as GENERATED

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "recipes" / "README.md"])
MARKDOWN = [*PAGES, *sorted((ROOT / "qtool").rglob("*.md")), *sorted((ROOT / "tools").rglob("*.md"))]
LONGEST_LINE = 120
UNUSUAL_WORDS = r"\b(rooms?|houses?|voices?|hears?|heard|hearing|crowds?|told|nobody)\b"


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks_of(text):
    """The language and the content of a page's code blocks, with continued lines joined."""
    found = re.findall(r"^ *```([^\n]*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(language, block.replace("\\\n", " ")) for language, block in found]


def prose_of(text):
    """A page without its code blocks; lines keep their numbers."""
    return re.sub(r"^ *```.*?^ *```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)


def spans_of(text):
    """The code spans of a page's prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(text))]


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_fresh(name):
    assert (ROOT / "docs" / name).read_text() == GENERATED[name](), "run `make docs`"


@cache
def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose_of(page.read_text())):
        if "://" not in target:
            path = page.parent / target if target else page
            assert path.exists(), target
            assert not anchor or anchor in anchors_of(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_modules_exist(page):
    for span in spans_of(page.read_text()):
        if re.fullmatch(r"(qtool|tests|tools|recipes|calibration|docs)/[\w./-]+", span):
            assert (ROOT / span).exists(), span
    for module in re.findall(r"python -m ((?:tests|tools)[\w.]*\w)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_lines_of_prose_are_short(page):
    for number, line in enumerate(prose_of(page.read_text()).splitlines(), start=1):
        is_excepted = line.startswith(("|", "    ")) or "](" in line
        assert is_excepted or len(line) <= LONGEST_LINE, f"line {number} has {len(line)} characters"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=name_of)
def test_words_are_plain(page):
    assert re.findall(UNUSUAL_WORDS, prose_of(page.read_text())) == []


def commands_of(text):
    """The arguments of every qtool command in a page's code blocks; without a language only of lines that begin so."""
    for language, block in blocks_of(text):
        if language == "python":
            continue
        begins = r"(?:^|[ '\"(])" if language else r"^\s*"
        for line in block.splitlines():
            command = re.sub(r"(^|\s)#.*", "", re.sub(r"\$\{\{.*?\}\}", "X", line))
            for found in re.finditer(begins + r"qtool (?=[a-z-])", command):
                yield arguments_of(command[found.end() :])


def arguments_of(text):
    """The words of a command up to its end: a pipe, or the quote in which the whole command stands."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters, words = True, "", []
    try:
        for word in lexer:
            if set(word) <= set(";|&()<>"):
                break
            words.append(word)
    except ValueError:  # a quote without its partner: it began before the command
        return arguments_of(re.sub(r"['\"][^'\"]*$", "", text))
    return words


def parse(arguments):
    """Parse a command line as qtool does, without running it; raises typer's error where it is wrong."""
    group = get_command(app)
    try:
        with group.make_context("qtool", list(arguments)) as context:
            name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            command.make_context(name, rest, parent=context)
    except typer.Exit:  # --help and --version end here
        return


def problem_of(arguments):
    """What typer says of a command line, or nothing."""
    try:
        parse(arguments)
    except Exception as error:  # noqa: BLE001 - its errors have no public base
        return str(error) or type(error).__name__
    return ""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page):
    for arguments in commands_of(page.read_text()):
        assert not problem_of(arguments), shlex.join(arguments)


def test_a_page_with_a_wrong_command_is_found():
    page = (
        '```sh\nqtool verify A \\\n --reference B | tail\nbash -c "x && qtool score A --shard $n/4"  # qtool x\n```\n'
    )
    assert list(commands_of(page)) == [["verify", "A", "--reference", "B"], ["score", "A", "--shard", "$n/4"]]
    for wrong in ("nope", "verify A", "quantize A --nope", "verify A --reference B --limit x"):
        assert problem_of(wrong.split())


@cache
def options_of(command):
    return set(re.findall(r"--?[a-z][\w-]*", help_of(command)))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_options_in_prose_exist(page):
    for span in spans_of(page.read_text()):
        if re.match(r"qtool [a-z]", span):
            command, *words = span.split()[1:]
            assert command in COMMANDS, span
            assert {word for word in words if word.startswith("-")} <= options_of(command), span


SERVERS = r"(llama-server|vllm serve|python -m sglang\.launch_server) "


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_servers_are_started_as_serve_command_says(page):
    """Only sessions show how; what they show is run."""
    text = page.read_text()
    assert not [span for span in spans_of(text) if re.match(SERVERS, span)]
    sessions = "".join(docs_examples.SESSION.findall(text))
    for line in "\n".join(block for _, block in blocks_of(text)).splitlines():
        assert not re.match(SERVERS, line) or line in sessions.splitlines(), line
    for command in re.findall(rf"^\$ (.*)\n(?:(?!\$ ).*\n)*?{SERVERS}", sessions, re.MULTILINE):
        assert command[0].startswith("qtool serve-command "), command[0]


def test_every_metric_is_explained_in_the_words_of_the_reports():
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|$", page, re.MULTILINE))
    names = {name for names in METRICS.values() for name in names if "_mrl" not in name}
    pairwise = {name for name in names if name.startswith("similarity_") and name != "similarity_spearman"}
    assert rows == {name: meaning(name).replace("|", "\\|") for name in names - pairwise}
    assert {name.replace("similarity", "log_odds") for name in pairwise} <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page):
    for target in re.findall(r"`make ([a-z-]+)", page.read_text()):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_troubleshooting_explains_every_exit_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert [int(code) for code in re.findall(r"^## Exit code (\d+)$", page, re.MULTILINE)] == sorted(EXIT_CODES)


def test_contributing_lists_every_make_target():
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE):
        assert f"| `make {target}` |" in contributing or target == "help", target


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
