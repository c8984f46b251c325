"""Writes a report in all its forms."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from qtool.errors import SetupError
from qtool.reporting import html, junit, markdown
from qtool.verify.report import SCHEMA_VERSION, Report

# The JSON schema of `report.json`, made from the report's own classes. Its $id carries the report's version. A
# version may gain fields, so a reader ignores those it does not know; it never loses one or gives one another
# meaning.


ID: Final = f"urn:qtool:report:{SCHEMA_VERSION}"


def report_schema() -> dict[str, Any]:
    """The schema as JSON objects (draft 2020-12)."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Report).json_schema(mode="serialization")
    for definition in (schema, *schema.get("$defs", {}).values()):
        if "properties" in definition:
            definition["required"] = list(definition["properties"])  # a report is written whole, defaults too
    schema["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": ID, **schema}


# Writes a report in all its forms. Each file is whole or not there; an older report is replaced, and report.json
# comes last, as the sign that all is there.


FORMS: Final[Mapping[str, Callable[[Report], str]]] = {
    "report.md": markdown.render_markdown,
    "report.html": html.render_html,
    "junit.xml": junit.render_junit,
    "report.json": lambda report: report.to_json() + "\n",
}


def write_reports(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.html, junit.xml and report.json into `folder`, which is made if need be."""
    # All are drawn before one is written.
    contents = {name: _bytes(name, form(report)) for name, form in FORMS.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [_replace(folder / name, content) for name, content in contents.items()]
    except OSError as error:
        raise SetupError(f"The report could not be written to {folder}: {error.strerror}.") from error


def _bytes(name: str, text: str) -> bytes:
    # A lone surrogate (a file name that is no UTF-8) is an escape in JSON and cannot be said elsewhere.
    return text.encode("utf-8", "backslashreplace" if name.endswith(".json") else "replace")


def _replace(path: Path, content: bytes) -> Path:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
