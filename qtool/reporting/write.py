"""Writes a report in all its forms, and the JSON schema of `report.json`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from qtool.escaping import reportable
from qtool.reporting import html, junit, markdown
from qtool.storage.atomic import atomic_write, named_write_errors
from qtool.verify.paired import Comparison
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


_COMPLETE: Final = "report.json"
FORMS: Final[Mapping[str, Callable[[Report], str]]] = {
    "report.md": markdown.render_markdown,
    "report.html": html.render_html,
    "junit.xml": junit.render_junit,
    _COMPLETE: lambda report: report.to_json() + "\n",  # written last, as the sign that all are there
}


def write_reports(report: Report, folder: Path) -> list[Path]:
    """Write report.md, report.html, junit.xml and report.json into `folder`, which is made if need be. Raises SetupError."""
    safe = reportable(report)  # for people; report.json itself escapes what is invisible
    return write_whole(folder, {name: form(report if name == _COMPLETE else safe) for name, form in FORMS.items()})


def write_page(report: Report, comparison: Comparison, folder: Path) -> None:
    """Write report.html again, with what was verified beside the artefact. Raises SetupError."""
    text = html.render_html(reportable(report), reportable(comparison))
    write_whole(folder, {"report.html": text})


def write_whole(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write files into `folder`, which is made if need be; the last is the sign that all are there. Raises SetupError."""
    contents = {folder / name: text.encode("utf-8", "replace") for name, text in texts.items()}
    with named_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # All are on the disk before one appears under its name, so that a full disk leaves no half of them.
    with ExitStack() as writing:
        for path, content in reversed(contents.items()):
            file = writing.enter_context(atomic_write(path))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    return list(contents)
