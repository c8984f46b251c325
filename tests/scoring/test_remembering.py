from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qtool.inputs.builtin import find_panel
from qtool.inputs.items import Item, Pair, Video
from qtool.inputs.panels import load_panel
from qtool.scoring import ledger
from qtool.scoring.cache import cached_answers, open_cache
from qtool.scoring.ledger import Ledger, open_ledger
from qtool.scoring.question_keys import QuestionKeys
from qtool.scoring.remembering import Remembering
from qtool.scoring.runtime import RuntimeOptions, open_runtime
from qtool.scoring.scorer import Answered, Scorer
from tests.inputs.site import serve

PAIRS = load_panel(find_panel("demo-mixed")).first(1).pairs[:8]
ITEMS = [PAIRS[0].query, *(pair.document for pair in PAIRS[:4])]


class Counting:
    """The demo model, counting what it is asked; after `dies_after` answers it is interrupted."""

    def __init__(self, name: str, dies_after: int | None = None) -> None:
        self.inner: Scorer = open_runtime(name, RuntimeOptions(device="cpu"))
        self.asked: list[str] = []
        self._left = dies_after

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def score(self, pairs: Sequence[Pair], answered: Answered) -> list[float]:
        self.asked += [pair.name for pair in pairs]
        return self.inner.score(pairs, self._mortal(answered))

    def embed(self, items: Sequence[Item], answered: Answered) -> object:
        self.asked += [item.id for item in items]
        return self.inner.embed(items, self._mortal(answered))

    def _mortal(self, answered: Answered) -> Answered:
        def reported(place: int, answer: object) -> None:
            if self._left == 0:
                raise KeyboardInterrupt
            answered(place, answer)
            self._left = None if self._left is None else self._left - 1

        return reported


def remembering(scorer: Counting, path: Path) -> Remembering:
    return Remembering(scorer, [open_ledger(path, scorer.inner.identity)])  # type: ignore[arg-type]


def cached(scorer: Scorer) -> Scorer:
    cache = open_cache(scorer.identity)
    return scorer if cache is None else Remembering(scorer, [cache])


def test_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    expected = open_runtime("qtool-demo-reranker", RuntimeOptions(device="cpu")).score(PAIRS)
    first = remembering(Counting("qtool-demo-reranker", dies_after=5), tmp_path / "l")
    with pytest.raises(KeyboardInterrupt):
        first.score(PAIRS)
    first.close()
    counting = Counting("qtool-demo-reranker")
    second = remembering(counting, tmp_path / "l")
    reported: dict[int, float] = {}
    scores = second.score(PAIRS, reported.__setitem__)
    assert len(counting.asked) == len(PAIRS) - 5
    assert reported == dict(enumerate(scores))
    # Other batch mates than in one go: measured 1.2e-6.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=5e-6)
    assert second.score(PAIRS) == scores
    assert len(counting.asked) == len(PAIRS) - 5


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    counting = Counting("qtool-demo-reranker")
    twice = [*PAIRS[:2], *(replace(pair, document=replace(pair.document, id="again")) for pair in PAIRS[:2])]
    reported: list[int] = []
    scores = remembering(counting, tmp_path / "l").score(twice, lambda place, _: reported.append(place))
    assert len(counting.asked) == 2
    assert sorted(reported) == [0, 1, 2, 3]
    assert scores[:2] == scores[2:]


def stores(folder: Path, *names: str) -> list[Ledger]:
    identity = open_runtime("qtool-demo-reranker", RuntimeOptions(device="cpu")).identity
    return [open_ledger(folder / name, identity) for name in names]


def test_with_several_stores_a_question_is_hashed_and_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    key = QuestionKeys.key
    monkeypatch.setattr(QuestionKeys, "key", lambda self, pair: hashed.append(pair.name) or key(self, pair))
    counting = Counting("qtool-demo-reranker")
    with closing(Remembering(counting, stores(tmp_path, "a", "b"))) as scorer:
        scores = scorer.score(PAIRS)
    assert hashed == counting.asked == [pair.name for pair in PAIRS]
    for name in "ab":
        silent = Counting("qtool-demo-reranker")
        with closing(Remembering(silent, stores(tmp_path, name))) as scorer:
            assert scorer.score(PAIRS) == scores
        assert silent.asked == []


def test_what_one_store_holds_is_written_to_the_others(tmp_path: Path) -> None:
    for name, part in (("a", PAIRS[:3]), ("b", PAIRS[2:5])):
        with closing(Remembering(Counting("qtool-demo-reranker"), stores(tmp_path, name))) as scorer:
            scorer.score(part)
    counting = Counting("qtool-demo-reranker")
    with closing(Remembering(counting, stores(tmp_path, "a", "b"))) as scorer:
        scorer.score(PAIRS[:6])
    assert counting.asked == [PAIRS[5].name]
    for each in stores(tmp_path, "a", "b"):
        assert len(each) == 6
        each.close()


def test_an_answer_is_in_every_store_before_it_is_reported(tmp_path: Path) -> None:
    both = stores(tmp_path, "a", "b")
    seen: list[tuple[int, int]] = []
    with closing(Remembering(Counting("qtool-demo-reranker"), both)) as scorer:
        scorer.score(PAIRS, lambda *_: seen.append((len(both[0]), len(both[1]))))
    assert seen == [(count, count) for count in range(1, len(PAIRS) + 1)]


def test_vectors_are_remembered(tmp_path: Path) -> None:
    counting = Counting("qtool-demo-embedder")
    first = remembering(counting, tmp_path / "l")
    vectors = first.embed(ITEMS)
    first.close()
    again = Counting("qtool-demo-embedder")
    np.testing.assert_array_equal(remembering(again, tmp_path / "l").embed(ITEMS), vectors)
    assert again.asked == []


def test_a_warm_cache_answers_without_loading_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QTOOL_CACHE", raising=False)
    cold = cached(open_runtime("qtool-demo-reranker"))
    scores = cold.score(PAIRS[:3])
    cold.close()
    (file,) = (tmp_path / "qtool" / "answers").rglob("*.jsonl")
    assert file == cached_answers(cold.identity)
    monkeypatch.setattr("qtool.scoring.transformers.runtime.load", lambda *_: pytest.fail("weights were loaded"))
    assert cached(open_runtime("qtool-demo-reranker")).score(PAIRS[:3]) == scores


def test_what_lies_behind_an_address_is_cached_for_one_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path))
    pages, vectors = {}, []
    with serve(pages) as site:
        address = f"{site.url}/x.png"
        items = [
            Item("here", ("x",)),
            Item("there", image=(address,)),
            Item("film", video=(Video((address, address)),)),
        ]
        for colour in ("red", "blue"):
            pages["/x.png"] = png(colour)
            site.asked.clear()
            with closing(cached(open_runtime("qtool-demo-embedder"))) as scorer:
                vectors.append(scorer.embed(items))
                seen = len(site.asked)
                np.testing.assert_array_equal(scorer.embed(items), vectors[-1])
                assert len(site.asked) == seen > 0
    is_equal = (vectors[0] == vectors[1]).all(axis=1)
    assert is_equal.tolist() == [True, False, False]
    (file,) = tmp_path.rglob("*.jsonl")
    assert len(file.read_text().splitlines()) == 2  # a header, and "here"


def png(colour: str) -> bytes:
    target = BytesIO()
    Image.new("RGB", (64, 64), colour).save(target, "PNG")
    return target.getvalue()


def test_the_environment_says_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = open_runtime("qtool-demo-reranker").identity
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "own"))
    assert cached_answers(identity).is_relative_to(tmp_path / "own" / "answers")
    monkeypatch.delenv("QTOOL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cached_answers(identity).is_relative_to(tmp_path / "home" / ".cache" / "qtool" / "answers")


def test_what_is_not_pinned_or_cannot_be_kept_is_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = open_runtime("qtool-demo-reranker")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "file"))
    assert cached(scorer) is scorer
    assert "Answers are not cached: " in caplog.text
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path / "fine"))
    unpinned = replace(scorer.identity, is_pinned=False)
    monkeypatch.setattr(scorer, "identity", unpinned)
    assert cached(scorer) is scorer
    assert not (tmp_path / "fine").exists()


def damage(content: bytes) -> list[bytes]:
    """What a crash, a bad disk or a person may leave of a ledger."""
    middle = len(content) // 2
    return [
        bytes(len(content)),
        content[:middle] + bytes(64) + content[middle + 64 :],
        content.replace(b'"log_odds"', b'"log_evens"', 1),
        b"notes\n",
        b"\xff\xfe" + content,
    ]


@pytest.mark.parametrize("kind", range(5))
def test_a_damaged_cache_is_set_aside_and_begun_anew(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path))
    first = cached(open_runtime("qtool-demo-reranker"))
    scores = first.score(PAIRS[:3])
    first.close()
    path = cached_answers(first.identity)
    broken = damage(path.read_bytes())[kind]
    path.write_bytes(broken)
    aside = path.with_name(f"{path.name}.broken")
    aside.write_text("an older one")
    second = cached(open_runtime("qtool-demo-reranker"))
    assert second.score(PAIRS[:3]) == scores
    second.close()
    assert aside.read_bytes() == broken
    assert [record.getMessage() for record in caplog.records if "*.broken" in record.getMessage()] == caplog.messages
    assert len(caplog.messages) == 1
    monkeypatch.setattr("qtool.scoring.transformers.runtime.load", lambda *_: pytest.fail("weights were loaded"))
    assert cached(open_runtime("qtool-demo-reranker")).score(PAIRS[:3]) == scores


def test_a_damaged_cache_that_cannot_be_set_aside_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path))
    scorer = open_runtime("qtool-demo-reranker")
    path = cached_answers(scorer.identity)
    path.parent.mkdir(parents=True)
    path.write_text("notes\n")
    path.with_name(f"{path.name}.broken").mkdir()
    assert cached(scorer) is scorer


def test_a_cache_that_takes_no_more_is_logged_once_and_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path))
    plain = open_runtime("qtool-demo-reranker").score(PAIRS)
    scorer = cached(open_runtime("qtool-demo-reranker"))
    written, write = [], ledger._write

    def full(descriptor: int, line: bytes) -> None:
        if len(written) == 3:
            write(descriptor, line[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(line)
        write(descriptor, line)

    monkeypatch.setattr(ledger, "_write", full)
    reported: dict[int, float] = {}
    scores = scorer.score(PAIRS, reported.__setitem__)
    assert scores == plain
    assert reported == dict(enumerate(scores))
    assert scorer.score(PAIRS) == scores
    assert len(caplog.messages) == 1
    assert "No space left on device. From here on" in caplog.text
    monkeypatch.setattr(ledger.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    scorer.close()
    monkeypatch.undo()
    with open_ledger(next(tmp_path.rglob("*.jsonl")), scorer.identity) as kept:
        assert len(kept) == 3
