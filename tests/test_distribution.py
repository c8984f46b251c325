"""What pip installs is called qtool-retrieval everywhere, since PyPI's `qtool` is another project's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = ("*.py", "*.md", "*.toml", "*.yml", "*.yaml", "*.txt", "*.jinja", "Makefile", "run")
NOT_OURS = {".venv", ".engines", ".git", "build", "dist", "node_modules"}
ENDS = r"(?![\w-]|\.\w)"
INSTALLERS = r"(?:pip3?|uv pip|uv tool|pipx|poetry|uv) (?:install|add)|uvx|uvx? (?:tool )?run"
OLD = {
    "an argument of an installer": rf"(?:{INSTALLERS})(?: +[^\s#&|;`]+)* +[\"']?qtool{ENDS}(?! +@)",
    "an extra": r"(?<![\w-])qtool\[\w",
    "a direct reference": r"(?<![\w./-])qtool *@ *(?:git\+|https?:|file:)",
    "a distribution's metadata": r"(?<!_)(?:version|requires|metadata|distribution|files)\([\"']qtool[\"']\)",
    "a distribution's name": r"^name *= *\"qtool\"",
}
NEW = r"--from qtool-retrieval\S* qtool\b"


def found_in(text):
    text = re.sub(NEW, "", text)
    return [
        f"{what}: {match[0]}" for what, pattern in OLD.items() for match in re.finditer(pattern, text, re.MULTILINE)
    ]


@pytest.mark.parametrize(
    "text",
    ["pip install qtool", "pip install 'qtool[score]'", 'python -m pip install -U "qtool"', "uv tool install qtool",
     "uvx qtool verify", "qtool @ git+https://x", "qtool[llamacpp]", 'version("qtool")', 'name = "qtool"',
     "pip install qtool==0.1", "pipx install qtool"],
)  # fmt: skip
def test_the_old_form_is_recognised(text):
    assert found_in(text)


@pytest.mark.parametrize(
    "text",
    ["pip install qtool-retrieval", "uv tool install 'qtool-retrieval[score]'", "uvx --from qtool-retrieval qtool demo",
     "pip install av, then run `qtool score`", "uses: OWNER/qtool@main", "qtool-retrieval[all] @ git+https://x/qtool"],
)  # fmt: skip
def test_the_new_form_is_not(text):
    assert not found_in(text)


def test_nothing_names_the_old_distribution():
    paths = {
        path for pattern in TEXTS for path in ROOT.rglob(pattern) if not NOT_OURS & set(path.relative_to(ROOT).parts)
    }
    assert len(paths) > 100
    texts = {path: path.read_text(encoding="utf-8") for path in paths - {Path(__file__)}}
    assert not {path.relative_to(ROOT).as_posix(): found for path, text in texts.items() if (found := found_in(text))}
