"""The HTTP runtime against servers that misbehave, real ones on the loopback interface."""

from __future__ import annotations

import re
import socket
import threading
import time
import traceback
from contextlib import closing

import httpx
import numpy as np
import pytest

from qtool.errors import ModelError, NetworkError, SetupError, UsageError
from qtool.inputs.items import Item, Pair
from qtool.scoring.http.client import HttpClient
from qtool.scoring.http.runtime import HttpOptions, open_http
from tests.scoring.servers import HTML, Reply, jina, many, results, serving

QUICK = HttpOptions(retries=0, timeout=5)
ONE_BY_ONE = HttpOptions(retries=0, timeout=5, concurrency=1)


def pairs(*documents, query="q"):
    return [Pair(Item(query, (query,)), Item(f"d{place}", (text,))) for place, text in enumerate(documents)]


def scored(answer, questions, options=QUICK):
    with serving(answer) as server, open_http(server.url, options) as scorer:
        return scorer.score(questions)


def failing(answer, questions, options=QUICK):
    """The error, and what was reported before it."""
    reported = {}
    with (
        serving(answer) as server,
        open_http(server.url, options) as scorer,
        pytest.raises((ModelError, NetworkError)) as caught,
    ):
        scorer.score(questions, reported.__setitem__)
    return caught.value, reported


def by_document(**replies):
    return jina(lambda _, documents: replies[documents[0]] if len(documents) == 1 else Reply("x", 500))


def test_probabilities_come_back_as_log_odds_in_the_order_of_the_pairs():
    values = {"a": 0.25, "b": 0.5, "c": 0.75}
    answer = jina(lambda _, documents: results(*(values[text] for text in documents)))
    assert scored(answer, pairs("c", "a", "b", "a")) == pytest.approx([np.log(3), -np.log(3), 0, -np.log(3)])


def test_equal_pairs_are_asked_once_and_a_query_brings_several_documents():
    with serving(jina(lambda _, documents: results(*[0.5] * len(documents)))) as server:
        with open_http(server.url, QUICK) as scorer:
            scorer.score([*pairs(*"abcab"), *pairs(*"ab", query="other")])
        asked = [(body["query"], body["documents"]) for body in server.bodies("/rerank")]
    assert sorted(asked) == [("other", ["a", "b"]), ("q", ["a", "b", "c"])]


def test_no_more_requests_than_asked_for_are_under_way():
    busy, most, lock = 0, 0, threading.Lock()

    def rank(_, documents):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)
        with lock:
            busy -= 1
        return results(*[0.5] * len(documents))

    scored(jina(rank), many(12), HttpOptions(concurrency=3))
    assert most == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (results(float("nan")), "not a finite number"),
        (results(None), "not a finite number"),
        (results(7.5), r"score 7\.5 is not a probability"),
        (results("high"), "contains 'high'; expected a number"),
        (results(0.5, 0.5), "index 1"),
        ({"results": [{"index": 0, "relevance_score": 0.5}] * 2}, "index 0 twice"),
        ({"results": [{"index": -1, "relevance_score": 0.5}]}, "index -1"),
        ({"results": []}, r"scores \(0\) differs from that of documents \(1\)"),
        ({"results": "none"}, "has an unknown format"),
        ([1, 2], "has an unknown format"),
        ("just text", "is not JSON: just text"),
        (HTML, "is not JSON: <html><body>Welcome to nginx"),
        (Reply("<html>oops</html>", 500, "text/html"), "answered 500: <html>oops</html>"),
        (Reply({"error": {"message": "too long"}}, 400), "answered 400: too long"),
        (Reply("no gzip", headers={"Content-Encoding": "gzip"}), "cannot be decoded: Error -3"),
    ],
)
def test_a_wrong_answer_names_pair_and_keeps_what_was_scored(reply, message):
    answers = {"good": results(0.5), "bad": reply if isinstance(reply, Reply) else Reply(reply), "fine": results(0.75)}
    error, reported = failing(by_document(**answers), pairs("good", "bad", "fine"))
    assert isinstance(error, ModelError)
    assert error.exit_code == 3
    assert error.message.startswith("query 'q', document 'd1'")
    assert re.search(message, error.message)
    assert reported == {0: 0.0, 2: pytest.approx(np.log(3))}


def dying(after, reply):
    """A server that gives `after` answers and then only `reply`."""
    given = iter(range(after))
    return jina(lambda _, documents: reply if next(given, None) is None else results(*[0.5] * len(documents)))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(hang_up=True), "Cannot reach http://127.0.0.1:.*/rerank"),
        (Reply("<html>Bad Gateway</html>", 502, "text/html"), "answered 502: <html>Bad Gateway"),
        (Reply({"detail": "loading"}, 503), "answered 503: loading"),
    ],
)
def test_a_server_that_dies_is_a_network_error_and_what_it_scored_is_kept(reply, message):
    with serving(dying(3, reply)) as server, open_http(server.url, ONE_BY_ONE) as scorer:
        reported = {}
        with pytest.raises(NetworkError, match=rf"^query 'q3', document 'd': .*{message}") as caught:
            scorer.score(many(6), reported.__setitem__)
    assert caught.value.exit_code == 5
    assert reported == {0: 0, 1: 0, 2: 0}


def test_answers_that_were_under_way_when_another_failed_are_kept():
    def rank(query, _):
        if query == "q0":
            return Reply({"message": "broken"}, 400)
        time.sleep(0.2)
        return results(0.5)

    error, reported = failing(jina(rank), many(20), HttpOptions(retries=0, concurrency=4))
    assert "query 'q0', document 'd'" in error.message
    assert set(reported) >= {1, 2, 3}
    assert len(reported) < 8  # those, and what was begun before the error was known


def test_a_server_that_hangs_is_given_up_after_the_timeout():
    gone = threading.Event()
    started = time.monotonic()
    try:
        error, _ = failing(
            jina(lambda *_: gone.wait(20) and None), many(1), HttpOptions(timeout=0.3, retries=3, concurrency=1)
        )
    finally:
        gone.set()
    assert isinstance(error, NetworkError)
    assert "did not answer within 0.3 seconds" in error.message
    assert time.monotonic() - started < 5


def test_what_passes_is_asked_again():
    replies = iter(
        [Reply("busy", 429, headers={"Retry-After": "0"}), Reply("x", 503), Reply(hang_up=True), results(0.5)]
    )
    started = time.monotonic()
    assert scored(jina(lambda *_: next(replies)), many(1), HttpOptions(retries=3)) == [0]
    assert time.monotonic() - started >= 0.5 + 1 + 2


@pytest.mark.parametrize(
    ("retries", "is_stopped", "hint"),
    [
        (0, False, "The request was sent once."),
        (1, False, "The request was sent 2 times."),
        (5, True, "The request was sent once."),
    ],
)
def test_the_hint_counts_what_was_really_asked(retries, is_stopped, hint):
    with serving(lambda *_: Reply("busy", 503)) as server:
        client = HttpClient(server.url, 5, retries)
        if is_stopped:
            client.stop.set()
        with closing(client), pytest.raises(NetworkError) as caught:
            client.post("qtool", "/rerank", {})
        assert caught.value.hint == hint
        assert len(server.asked) == int(re.sub("once", "1 times", hint).split()[4])


def test_an_interrupted_run_ends_at_once_and_asks_nothing_again():
    arrived, gone = threading.Barrier(4), threading.Event()

    def rank(query, _):
        arrived.wait(10)
        return results(0.5) if query == "q0" else gone.wait(20) and None

    def interrupt(*_):
        raise KeyboardInterrupt

    with serving(jina(rank)) as server:
        try:
            scorer = open_http(server.url, HttpOptions(concurrency=4, timeout=20))
            with scorer, pytest.raises(KeyboardInterrupt):
                scorer.score(many(4), interrupt)
            started = time.monotonic()
            for worker in threading.enumerate():
                if worker.name.startswith("ThreadPoolExecutor"):
                    worker.join(10)
            assert time.monotonic() - started < 3
        finally:
            gone.set()
        assert sorted(body["query"] for body in server.bodies("/rerank")) == ["q0", "q1", "q2", "q3"]
        with pytest.raises(UsageError, match=r"connections to .* are closed"):
            scorer.score(many(1))


def test_nobody_there_is_a_network_error():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(NetworkError, match=rf"^Cannot reach {url}/props: .*refused"):
            open_http(url, QUICK)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/", "http://user:secret@host", "http://host/?key=secret", "https://"]
)
def test_an_address_that_is_none_is_refused_without_showing_secrets(url):
    with pytest.raises(UsageError) as caught:
        open_http(url)
    assert "secret" not in caught.value.message


def test_the_api_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("QTOOL_API_KEY", "s3cret")
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    with (
        serving(jina(lambda *_: Reply({"error": "no"}, 401))) as server,
        open_http(server.url, QUICK) as scorer,
        pytest.raises(NetworkError, match="answered 401: no") as caught,
    ):
        scorer.score(many(1))
    assert "QTOOL_API_KEY" in caught.value.hint
    assert "s3cret" not in f"{caught.value!r} {caught.value.message} {caught.value.hint} {scorer.identity}"
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Bearer s3cret"}


def test_a_key_with_a_line_end_is_sent_without_it(monkeypatch):
    monkeypatch.setenv("QTOOL_API_KEY", " s3cret\n")
    with serving(jina(lambda *_: results(0.5))) as server, open_http(server.url, QUICK) as scorer:
        scorer.score(many(1))
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Bearer s3cret"}


@pytest.mark.parametrize("key", ["s3crét", "s3c\nret", "s3cret\x7f"])
def test_a_key_that_no_header_holds_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("QTOOL_API_KEY", key)
    with (
        serving(jina(lambda *_: results(0.5))) as server,
        pytest.raises(UsageError, match="environment variable QTOOL_API_KEY") as caught,
    ):
        open_http(server.url, QUICK)
    assert "s3c" not in "".join(traceback.format_exception(caught.value))
    assert not server.asked


def test_a_complaint_about_a_header_is_not_quoted(monkeypatch):
    def request(*_, **__):
        raise httpx.LocalProtocolError("Illegal header value b'Bearer s3cret'")

    monkeypatch.setattr(httpx.Client, "stream", request)
    with pytest.raises(NetworkError, match="is not valid HTTP") as caught:
        open_http("http://127.0.0.1:9", HttpOptions(retries=3))
    assert "b'Bearer" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "ftp://proxy"), ("ALL_PROXY", "http://[::1"), ("SSL_CERT_FILE", "/no/such/file")],
)
def test_an_environment_that_no_client_takes_is_a_matter_of_the_machine(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match="Cannot create an HTTP client: ") as caught:
        open_http("http://localhost:9", QUICK)
    assert name in caught.value.hint


def test_a_base_that_ends_in_v1_is_the_same_server():
    with serving(jina(lambda *_: results(0.5))) as server, open_http(f"{server.url}/v1/", QUICK) as scorer:
        assert scorer.score(many(1)) == [0]
