"""The HTTP runtime against servers that misbehave, real ones on the loopback interface."""

from __future__ import annotations

import re
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from qtool.arch.prompts import TEXT_EMBEDDER, TEXT_RERANKER, VL_EMBEDDER
from qtool.arch.spec import Task
from qtool.errors import ModelError, NetworkError, UsageError
from qtool.inputs.items import Item, Pair, Video
from qtool.scoring.http import HttpOptions, open_http
from qtool.scoring.http_detect import ServerKind
from tests.scoring.servers import Reply, jina, results, serving

QUICK = HttpOptions(retries=0, timeout=5)
ONE_BY_ONE = HttpOptions(retries=0, timeout=5, concurrency=1)
HTML = Reply("<html><body>Welcome to nginx</body></html>", content_type="text/html")


def pairs(*documents, query="q"):
    return [Pair(Item(query, (query,)), Item(f"d{place}", (text,))) for place, text in enumerate(documents)]


def many(count):
    return [Pair(Item(f"q{place}", (f"q{place}",)), Item("d", ("d",))) for place in range(count)]


def scored(answer, questions, options=QUICK):
    with serving(answer) as server, open_http(server.url, options) as scorer:
        return scorer.score(questions)


def failing(answer, questions, options=QUICK):
    """The error, and what was told before it."""
    told = {}
    with (
        serving(answer) as server,
        open_http(server.url, options) as scorer,
        pytest.raises((ModelError, NetworkError)) as caught,
    ):
        scorer.score(questions, told.__setitem__)
    return caught.value, told


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
        (results(7.5), r"score 7\.5 is no probability"),
        (results("high"), "'high' where a number should be"),
        (results(0.5, 0.5), "index 1"),
        ({"results": [{"index": 0, "relevance_score": 0.5}] * 2}, "index 0, or scores it twice"),
        ({"results": [{"index": -1, "relevance_score": 0.5}]}, "index -1"),
        ({"results": []}, "0 scores for 1 documents"),
        ({"results": "none"}, "none of the known shapes"),
        ([1, 2], "none of the known shapes"),
        ("just text", "not JSON: just text"),
        (HTML, "not JSON: <html><body>Welcome to nginx"),
        (Reply("<html>oops</html>", 500, "text/html"), "answers 500: <html>oops</html>"),
        (Reply({"error": {"message": "too long"}}, 400), "answers 400: too long"),
        (Reply("", 302, headers={"Location": "http://elsewhere"}), "answers 302"),
    ],
)
def test_a_wrong_answer_names_pair_and_keeps_what_was_scored(reply, message):
    answers = {"good": results(0.5), "bad": reply if isinstance(reply, Reply) else Reply(reply), "fine": results(0.75)}
    error, told = failing(by_document(**answers), pairs("good", "bad", "fine"))
    assert isinstance(error, ModelError)
    assert error.exit_code == 3
    assert error.message.startswith("query 'q', document 'd1'")
    assert re.search(message, error.message)
    assert told == {0: 0.0, 2: pytest.approx(np.log(3))}


def dying(after, reply):
    """A server that gives `after` answers and then only `reply`."""
    given = iter(range(after))
    return jina(lambda _, documents: reply if next(given, None) is None else results(*[0.5] * len(documents)))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(hang_up=True), "cannot be reached"),
        (Reply("<html>Bad Gateway</html>", 502, "text/html"), "answers 502: <html>Bad Gateway"),
        (Reply({"detail": "loading"}, 503), "answers 503: loading"),
    ],
)
def test_a_server_that_dies_is_a_network_error_and_what_it_scored_is_kept(reply, message):
    with serving(dying(3, reply)) as server, open_http(server.url, ONE_BY_ONE) as scorer:
        told = {}
        with pytest.raises(
            NetworkError, match=rf"^query 'q3', document 'd': {re.escape(server.url)}/.*{message}"
        ) as caught:
            scorer.score(many(6), told.__setitem__)
    assert caught.value.exit_code == 5
    assert told == {0: 0, 1: 0, 2: 0}


def test_answers_that_were_under_way_when_another_failed_are_kept():
    def rank(query, _):
        if query == "q0":
            return Reply({"message": "broken"}, 400)
        time.sleep(0.2)
        return results(0.5)

    error, told = failing(jina(rank), many(20), HttpOptions(retries=0, concurrency=4))
    assert "query 'q0', document 'd'" in error.message
    assert set(told) >= {1, 2, 3}
    assert len(told) < 8  # those, and what was begun before the error was heard of


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
    assert "has not answered within 0.3 seconds" in error.message
    assert time.monotonic() - started < 5


def test_what_passes_is_asked_again():
    replies = iter(
        [Reply("busy", 429, headers={"Retry-After": "0"}), Reply("x", 503), Reply(hang_up=True), results(0.5)]
    )
    started = time.monotonic()
    assert scored(jina(lambda *_: next(replies)), many(1), HttpOptions(retries=3)) == [0]
    assert time.monotonic() - started >= 0.5 + 1 + 2


def test_nobody_there_is_a_network_error():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(NetworkError, match=rf"qtool: {url}/props cannot be reached: .*refused"):
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
        pytest.raises(NetworkError, match="answers 401: no") as caught,
    ):
        scorer.score(many(1))
    assert "QTOOL_API_KEY" in caught.value.hint
    assert "s3cret" not in f"{caught.value!r} {caught.value.message} {caught.value.hint} {scorer.identity}"
    assert {headers["Authorization"] for _, headers, _ in server.asked} == {"Bearer s3cret"}


def test_a_base_that_ends_in_v1_is_the_same_server():
    with serving(jina(lambda *_: results(0.5))) as server, open_http(f"{server.url}/v1/", QUICK) as scorer:
        assert scorer.score(many(1)) == [0]


PAGES = {
    "/props": {"default_generation_settings": {}, "build_info": "b1-abc", "media_marker": "<m>"},
    "/info": {"model_id": "BAAI/some", "version": "1.9.0", "model_type": {"reranker": {}}},
    "/version": {"version": "0.33.0"},
}


@pytest.mark.parametrize(
    ("page", "engine", "model"),
    [
        ("/props", "llama-server b1-abc", "listed"),
        ("/info", "tei 1.9.0", "BAAI/some"),
        ("/version", "vllm 0.33.0", "listed"),
        (None, "jina", "listed"),
    ],
)
def test_engines_are_told_apart_by_a_page_of_their_own(page, engine, model):
    pages = {"/v1/models": {"data": [{"id": "listed"}]}, **({page: PAGES[page]} if page else {})}
    with serving(lambda path, _: pages.get(path)) as server, open_http(server.url, QUICK) as scorer:
        identity = scorer.identity
    assert (identity.engine, identity.model, identity.is_pinned) == (engine, f"{server.url} {model}", False)


def test_a_web_site_is_no_engine_and_the_engine_can_be_said():
    with serving(lambda *_: HTML) as server:
        with open_http(server.url, QUICK) as scorer:
            assert scorer.server.kind is ServerKind.JINA
        with open_http(server.url, HttpOptions(engine=ServerKind.VLLM, model="m")) as scorer:
            assert scorer.identity.engine == "vllm"


def test_the_task_is_what_a_server_has_pages_for():
    refused = Reply({"message": "empty"}, 400)
    rerankers = (
        {"/version": PAGES["/version"], "/classify": refused},
        {"/props": PAGES["/props"], "/v1/rerank": refused},
    )
    embedders = (
        {"/version": PAGES["/version"], "/score": refused, "/v1/embeddings": refused},
        {"/props": PAGES["/props"], "/v1/rerank": Reply({"message": "not supported"}, 501)},
        {"/info": PAGES["/info"] | {"model_type": {"embedding": {}}}, "/rerank": refused},
    )
    for pages, task in [*((each, Task.RERANK) for each in rerankers), *((each, Task.EMBED) for each in embedders)]:
        with serving(lambda path, _: pages.get(path)) as server, open_http(server.url, QUICK) as scorer:  # noqa: B023
            assert scorer.task is task
            with pytest.raises(UsageError, match="does not"):
                scorer.embed([]) if task is Task.RERANK else scorer.score([])


def test_of_several_models_one_must_be_named():
    models = {"/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}, "/version": {"version": "1"}}
    with serving(lambda path, _: models.get(path)) as server:
        with pytest.raises(UsageError, match="several models: a, b"):
            open_http(server.url, QUICK)
        with open_http(server.url, HttpOptions(model="b")) as scorer:
            assert scorer.server.model == "b"


PICTURED = Pair(Item("q", ("q",)), Item("seen", image=(Image.new("RGB", (64, 64)),)))
FILMED = Pair(Item("q", ("q",)), Item("film", video=(Video("film.mp4"),)))
ASKED = Pair(Item("q", ("q",), instruction="Judge the colour."), Item("d", ("d",)))


@pytest.mark.parametrize(
    ("kind", "pair", "message"),
    [
        (ServerKind.JINA, PICTURED, "Item 'seen' holds a picture"),
        (ServerKind.TEI, PICTURED, "Item 'seen' holds a picture"),
        (ServerKind.LLAMA_SERVER, PICTURED, "Item 'seen' holds a picture: llama-server's /v1/rerank takes texts"),
        (ServerKind.JINA, ASKED, "query 'q', document 'd': .*cannot be given an instruction"),
        (ServerKind.LLAMA_SERVER, ASKED, "query 'q', document 'd': .*baked into its file"),
        (ServerKind.TEI, ASKED, "no place for an instruction"),
        (ServerKind.LLAMA_SERVER, Pair(Item("q", ("{document}",)), Item("d", ("d",))), "in place of {document}"),
        (ServerKind.LLAMA_SERVER, Pair(Item("q", ("q",)), Item("none")), "Item 'none' is empty"),
        *((kind, FILMED, "Item 'film' holds a video") for kind in ServerKind),
    ],
)
def test_what_an_engine_cannot_take_is_refused_before_anything_is_sent(kind, pair, message):
    with (
        serving(lambda *_: None) as server,
        open_http(server.url, HttpOptions(engine=kind, model="m", task=Task.RERANK)) as scorer,
    ):
        before = len(server.asked)
        with pytest.raises(UsageError, match=message):
            scorer.score([*many(3), pair])
        assert len(server.asked) == before


def test_embedding_needs_the_prompt_and_one_vector_of_some_length():
    vectors = {"ok": [3, 4], "zero": [0, 0], "nan": [float("nan"), 1], "null": [None, 1], "none": []}

    def answer(path, body):
        return {"data": [{"embedding": vectors[body["input"]]}]} if path == "/v1/embeddings" else None

    options = HttpOptions(model="m", family="qwen3", retries=0, concurrency=1)
    with serving(answer) as server:
        with (
            open_http(server.url, HttpOptions(model="m")) as scorer,
            pytest.raises(UsageError, match="prompt depends on the model"),
        ):
            scorer.embed([Item("i", ("ok",))])
        with open_http(server.url, options) as scorer:
            np.testing.assert_allclose(scorer.embed([Item("i", ("ok",))]), [[0.6, 0.8]])
            assert scorer.query_instruction == TEXT_EMBEDDER.query_instruction
            for broken in ("zero", "nan", "null", "none"):
                told = {}
                with pytest.raises(ModelError, match=f"item '{broken}': .*vector"):
                    scorer.embed([Item("i", ("ok",)), Item(broken, (broken,))], told.__setitem__)
                assert set(told) == {0}


def test_tei_gets_the_official_prompt_in_two_halves_and_answers_in_log_odds():
    def answer(path, body):
        if path == "/info":
            return PAGES[path]
        if path == "/embed":
            return [[float(len(body["inputs"][0])), 0.0]]
        return [{"index": 1, "score": -3.5}, {"index": 0, "score": 12.25}] if path == "/rerank" else None

    asked = [Pair(Item("q", ("Q",), instruction="Find."), Item(name, (name,))) for name in ("a", " b")]
    with serving(answer) as server:
        with open_http(server.url, HttpOptions(family="qwen3")) as scorer:
            assert scorer.score(asked) == [12.25, -3.5]
        with open_http(server.url, HttpOptions(family="qwen3_vl", task=Task.EMBED)) as scorer:
            assert scorer.embed([Item("i", ("text",))]).tolist() == [[1, 0]]
        (body,) = server.bodies("/rerank")
        (embedded,) = server.bodies("/embed")
    prompts = [body["query"] + text for text in body["texts"]]
    assert prompts == [
        TEXT_RERANKER.template.format(instruction="Find.", query="Q", document=pair.document.joined_text)
        for pair in asked
    ]
    assert body["query"].endswith("<Document>:")
    official = VL_EMBEDDER.template.format(instruction=VL_EMBEDDER.default_instruction, content="text")
    assert embedded["inputs"] == [official]
