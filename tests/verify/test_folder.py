from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from qtool.errors import SetupError, UsageError
from qtool.reporting.write import FORMS
from qtool.verify.case import ANSWERS, LEDGERS, REPORT, REPORTS, Role, answer_file, check_output, prepare_folder


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with every file that a verification writes, and one that somebody else wrote."""
    folder = tmp_path / "out"
    (folder / ANSWERS).mkdir(parents=True)
    for name in (*REPORTS, "notes.txt", f"{ANSWERS}/notes.txt"):
        (folder / name).write_text(name)
    (folder / REPORT).write_text('{"artefact": {}, "reference": {}, "verdict": "pass"}')
    for name in LEDGERS:
        (folder / ANSWERS / name).write_text('{"qtool_answers": 1}')
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_folder_knows_every_file_that_is_written_into_it() -> None:
    assert set(REPORTS) == set(FORMS)
    assert [Path(ANSWERS) / name for name in LEDGERS] == [answer_file(Path(), role) for role in Role]


def test_a_finished_verification_is_replaced_only_with_force(finished: Path) -> None:
    before = names(finished)
    with pytest.raises(UsageError, match="holds a finished verification"):
        prepare_folder(finished, force=False)
    assert names(finished) == before
    prepare_folder(finished, force=True)
    assert names(finished) == ["answers", "answers/notes.txt", "notes.txt"]


def test_a_look_at_the_output_changes_nothing(finished: Path, tmp_path: Path) -> None:
    before = names(tmp_path)
    check_output(finished, force=True)
    check_output(tmp_path / "new" / "folder", force=True)
    assert names(tmp_path) == before


def test_a_run_that_goes_on_keeps_the_answers_and_no_older_report(finished: Path) -> None:
    (finished / REPORT).unlink()
    prepare_folder(finished, force=False)
    assert names(finished) == ["answers", *sorted(f"answers/{name}" for name in (*LEDGERS, "notes.txt")), "notes.txt"]


def test_force_begins_an_unfinished_verification_anew(finished: Path) -> None:
    (finished / REPORT).unlink()
    prepare_folder(finished, force=True)
    assert names(finished) == ["answers", "answers/notes.txt", "notes.txt"]


@pytest.mark.parametrize("force", [True, False])
def test_somebody_elses_folder_is_left_alone(tmp_path: Path, *, force: bool) -> None:
    (tmp_path / "report.md").write_text("dear diary")
    with pytest.raises(UsageError, match="was not written by qtool verify"):
        prepare_folder(tmp_path, force=force)
    with pytest.raises(UsageError, match="was not written by qtool verify"):
        prepare_folder(tmp_path / "report.md", force=force)
    assert (tmp_path / "report.md").read_text() == "dear diary"


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", '{"tests": 3}'),
        ("report.json", "[]"),
        ("report.json", "no JSON"),
        ("report.md", "dear diary"),
        ("answers/reference.jsonl", '{"answer": 42}'),
    ],
)
def test_files_that_only_have_our_names_are_left_alone(tmp_path: Path, name: str, content: str, *, force: bool) -> None:
    (tmp_path / ANSWERS).mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match="was not written by qtool verify"):
        prepare_folder(tmp_path, force=force)
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("start", ["", '{"qtool', '{"qtool_answers": 1, "qtool'])
def test_a_run_goes_on_after_one_that_was_killed_at_its_first_line(tmp_path: Path, start: str) -> None:
    (tmp_path / ANSWERS).mkdir()
    prepare_folder(tmp_path, force=False)
    (tmp_path / ANSWERS / LEDGERS[0]).write_text(start)
    prepare_folder(tmp_path, force=False)
    assert names(tmp_path) == [ANSWERS, f"{ANSWERS}/{LEDGERS[0]}"]


def test_answers_that_another_run_is_writing_are_not_removed(finished: Path) -> None:
    (finished / REPORT).unlink()
    before = names(finished)
    with (finished / ANSWERS / LEDGERS[-1]).open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="Another run is writing"):
            prepare_folder(finished, force=True)
    assert names(finished) == before


def test_a_place_that_cannot_be_written_is_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"file/x/y cannot be written: .*file is not a folder"):
        check_output(tmp_path / "file" / "x" / "y", force=False)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may do everything
    with pytest.raises(SetupError, match="no permission for"):
        check_output(tmp_path / "new", force=False)


def test_a_file_that_cannot_be_removed_or_made_is_a_matter_of_the_machine(finished: Path, tmp_path: Path) -> None:
    (finished / "report.md").unlink()
    (finished / "report.md").mkdir()
    with pytest.raises(SetupError, match="cannot be written: "):
        prepare_folder(finished, force=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SetupError, match="cannot be written: File exists"):
        prepare_folder(tmp_path / "dangling", force=False)
