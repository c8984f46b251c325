"""Writes a report in all its forms, and the JSON schema of `report.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from qtool.reporting import html, junit, markdown
from qtool.storage.atomic import atomic_write, named_write_errors
from qtool.verify.report import SCHEMA_VERSION, Report

ID: Final = f"urn:qtool:report:{SCHEMA_VERSION}"


def report_schema() -> dict[str, Any]:
    """The schema of `report.json` (draft 2020-12), made from the report's classes; its $id carries the report's version.

    A version may gain fields, so readers ignore those they do not know; it never loses one or gives one another meaning.
    """
    from pydantic import TypeAdapter

    schema = TypeAdapter(Report).json_schema(mode="serialization")
    for definition in (schema, *schema.get("$defs", {}).values()):
        if "properties" in definition:
            definition["required"] = list(definition["properties"])  # a report is written whole, defaults too
    schema["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": ID, **schema}


FORMS: Final[Mapping[str, Callable[[Report], str]]] = {
    "report.md": markdown.render_markdown,
    "report.html": html.render_html,
    "junit.xml": junit.render_junit,
    "report.json": lambda report: report.to_json() + "\n",  # written last, as the sign that all are there
}


def write_reports(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.html, junit.xml and report.json into `folder`, which is made if need be. Raises SetupError."""
    contents = {folder / name: _bytes(name, form(report)) for name, form in FORMS.items()}  # all, before one is written
    with named_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path, content in contents.items():
        with atomic_write(path) as file:
            file.write(content)
    return list(contents)


def _bytes(name: str, text: str) -> bytes:
    # A lone surrogate (from a file name that is not UTF-8) can be written as an escape in JSON only.
    return text.encode("utf-8", "backslashreplace" if name.endswith(".json") else "replace")
