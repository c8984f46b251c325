"""Texts to calibrate on and texts to evaluate on: docstrings of different installed packages, licences and READMEs."""

from __future__ import annotations

import ast
import importlib.util
import random
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

CALIBRATION_PACKAGES = ("networkx", "modelopt", "huggingface_hub", "pydantic", "datasets", "rich")
EVALUATION_PACKAGES = ("numpy", "pip", "numba", "hypothesis", "PIL")


class Entry(NamedTuple):
    """A docstring: its summary line, and the text after it."""

    summary: str
    text: str


def docstrings(packages: Sequence[str], seed: int) -> list[Entry]:
    """All different docstrings of more than a summary, in an order drawn by `seed`."""
    found = {entry.text: entry for package in packages for entry in _of_package(package)}
    entries = sorted(found.values())
    random.Random(seed).shuffle(entries)
    return entries


@cache
def _of_package(package: str) -> tuple[Entry, ...]:
    return tuple(_parsed(package))


def _parsed(package: str) -> Iterator[Entry]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    for path in sorted(Path(spec.origin).parent.rglob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                summary, _, text = (ast.get_docstring(node) or "").partition("\n")
                if len(summary) > 20 and len(text := " ".join(text.split())) > 200:
                    yield Entry(summary.strip(), text)


def prose(seed: int, length: int = 300) -> list[str]:
    """Paragraphs of the licences and READMEs of installed packages."""
    found = set()
    for distribution in distributions():
        files = [file for file in distribution.files or () if "LICENSE" in file.name.upper()]
        texts = [distribution.metadata.get("Description") or distribution.metadata.get_payload() or ""]
        for file in files:
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        for text in texts:
            for paragraph in str(text).split("\n\n"):
                words = " ".join(paragraph.split())
                if len(words) > 100:
                    found.add(words[:length])
    paragraphs = sorted(found)
    random.Random(seed).shuffle(paragraphs)
    return paragraphs
