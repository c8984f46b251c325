"""A disk that fills at any byte leaves no half of what belongs together, and the error says why."""

from __future__ import annotations

import json
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from qtool.errors import SetupError, reason
from qtool.reporting.write import FORMS, write_reports
from qtool.scoring.embed import EmbedOptions as Options
from qtool.scoring.embed import Row, Texts, embed
from qtool.scoring.embed import _write as write_vectors
from qtool.scoring.runtime import RuntimeOptions
from qtool.storage.atomic import atomic_write, named_write_errors
from tests.reporting.reports import whole
from tests.scoring.servers import serving


@contextmanager
def no_file_longer_than(nbytes):
    """As on a disk that is full: writing beyond fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ROWS = [Row(place, line=place + 1) for place in range(40)]
VECTORS = np.ones((40, 64), np.float32)


@pytest.mark.parametrize("limit", [0, 64, 128, 1000, 4096, 10_000])
def test_vectors_and_ids_appear_together_or_not_at_all(limit, tmp_path):
    output, ids = tmp_path / "v.npy", tmp_path / "v.ids.jsonl"
    with no_file_longer_than(limit), pytest.raises(SetupError, match="cannot be written: File too large"):
        write_vectors(output, ids, ROWS, VECTORS)
    assert list(tmp_path.iterdir()) == []
    write_vectors(output, ids, ROWS, VECTORS)
    np.testing.assert_array_equal(np.load(output), VECTORS)
    assert len(ids.read_text().splitlines()) == 40


def test_the_names_of_rows_may_be_what_is_too_long(tmp_path):
    output, ids = tmp_path / "v.npy", tmp_path / "v.ids.jsonl"
    with no_file_longer_than(600), pytest.raises(SetupError, match=r"ids\.jsonl cannot be written: File too large"):
        write_vectors(output, ids, ROWS, VECTORS[:, :2])
    assert list(tmp_path.iterdir()) == []


def test_embed_keeps_answers_to_go_on_from_and_nothing_else(tmp_path):
    def answer(path, _):
        return {"data": [{"embedding": [0.5] * 64}]} if path == "/v1/embeddings" else None

    with serving(answer) as server:
        runtime = RuntimeOptions(task="embed", engine="jina", served_model="m", family="qwen3")
        texts = Texts(lines=tuple(f"text {n}" for n in range(20)))
        options = Options(target=server.url, source=texts, output=tmp_path / "v.npy", runtime=runtime)
        with no_file_longer_than(3000), pytest.raises(SetupError, match=r"v\.npy.* cannot be written: File too large"):
            embed(options)
        assert [path.name for path in tmp_path.iterdir()] == ["v.npy.partial"]
        asked = len(server.bodies("/v1/embeddings"))
        embed(options)
        assert len(server.bodies("/v1/embeddings")) < asked + 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v.ids.jsonl", "v.npy"]


@pytest.mark.parametrize("limit", [0, 1000, 3000, 20_000])
def test_the_forms_of_a_report_appear_together_or_not_at_all(limit, tmp_path):
    report = whole()
    with no_file_longer_than(limit), pytest.raises(SetupError, match="cannot be written: File too large"):
        write_reports(report, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    write_reports(report, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FORMS)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["schema_version"] == report.schema_version


def test_a_file_that_is_replaced_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text("old")
    with no_file_longer_than(10), pytest.raises(SetupError), atomic_write(path) as file:
        file.write(b"x" * 100)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["scores.jsonl"]


@pytest.mark.parametrize(
    "error", [OSError("3200 requested and 0 written"), OSError(), OSError(28, None), OSError(None, None)]
)
def test_no_error_says_none(error, tmp_path):
    assert "None" not in reason(error)
    with pytest.raises(SetupError) as caught, named_write_errors(tmp_path):
        raise error
    assert "None" not in caught.value.message
