"""The texts of the general calibration sets, and where each comes from: `texts/*` and `sources.yaml`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

TEXTS = Path(__file__).parent / "texts"
SOURCES = Path(__file__).parent / "sources.yaml"


class Source(BaseModel):
    """A package, or what was written here: its licence, who holds the copyright, and the package's file with its SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    content: str
    license: str
    copyright: str
    package: str = ""
    sha256: str = ""
    notice: str = ""


@dataclass(frozen=True)
class Text:
    """A titled text of a source."""

    source: str
    language: str
    title: str
    text: str

    @property
    def id(self) -> str:
        """Names it in the sets; from its content, so that a text added later renames no other."""
        digest = hashlib.sha256(f"{self.title}\n{self.text}".encode()).hexdigest()
        return f"{self.language}-{self.source}-{digest[:8]}"


def load_sources() -> list[Source]:
    """Every source, in the order of the file."""
    return [Source.model_validate(source) for source in yaml.safe_load(SOURCES.read_text(encoding="utf-8"))]


def load_texts() -> list[Text]:
    """Every text of every source."""
    return [
        Text(source.name, each["language"], each["title"], each["text"])
        for source in load_sources()
        for each in _read(source.name)
    ]


def _read(source: str) -> list[dict[str, str]]:
    own = TEXTS / f"{source}.yaml"
    if own.exists():
        written: list[dict[str, str]] = yaml.safe_load(own.read_text(encoding="utf-8"))
        return written
    return [json.loads(line) for line in (TEXTS / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()]
