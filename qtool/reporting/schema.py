"""The JSON schema of `report.json`, made from the report's own classes.

Rule: its $id carries the report's version. A version may gain fields, so a reader ignores those it does not know; it
never loses one or gives one another meaning.
"""

from __future__ import annotations

from typing import Any, Final

from qtool.verification.report import SCHEMA_VERSION, Report

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
