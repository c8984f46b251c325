"""A JSON file that cannot be read is an error that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.errors import ModelError
from qtool.jsonfile import read_json


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> str:  # root may read everything
        raise PermissionError(13, "Permission denied")

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ModelError, match=r"Cannot read .*config\.json: Permission denied\."):
        read_json(tmp_path / "config.json")


def test_a_folder_in_a_files_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"Cannot read .*config\.json: Is a directory\."):
        read_json(tmp_path / "config.json")
