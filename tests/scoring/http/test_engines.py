"""Which engine answers, and what each is asked: servers on the loopback interface with their pages and shapes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qtool.arch.prompts import TEXT_EMBEDDER, TEXT_RERANKER, VL_EMBEDDER, VL_RERANKER
from qtool.arch.spec import Task
from qtool.errors import ModelError, NetworkError, UsageError
from qtool.inputs.items import Item, Pair, Video
from qtool.scoring.http.detect import ServerKind
from qtool.scoring.http.runtime import HttpOptions, open_http
from tests.scoring.servers import HTML, Reply, jina, many, results, serving

QUICK = HttpOptions(retries=0, timeout=5)


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
            with pytest.raises(UsageError, match="cannot"):
                scorer.embed([]) if task is Task.RERANK else scorer.score([])


@pytest.mark.parametrize(
    "pages",
    [
        {"/props": PAGES["/props"], "/v1/rerank": Reply({"message": "empty"}, 400)},
        {"/info": PAGES["/info"], "/embed": Reply({"message": "empty"}, 424)},
    ],
)
def test_a_server_that_says_that_it_ranks_is_not_asked_for_vectors(pages):
    with (
        serving(lambda path, _: pages.get(path)) as server,
        pytest.raises(UsageError, match=rf"{server.url} serves a reranker \(as (llama-server|tei) reports\)") as caught,
    ):
        open_http(server.url, HttpOptions(task=Task.EMBED, model="m", retries=0))
    assert "reranker as the reference" in caught.value.hint


def test_of_several_models_one_must_be_named():
    models = {"/v1/models": {"data": [{"id": "a"}, {"id": "b"}]}, "/version": {"version": "1"}}
    with serving(lambda path, _: models.get(path)) as server:
        with pytest.raises(UsageError, match="several models: a, b"):
            open_http(server.url, QUICK)
        with open_http(server.url, HttpOptions(model="b")) as scorer:
            assert scorer.server.model == "b"


LOADING = {"error": {"message": "Loading model"}}


@pytest.mark.parametrize(("page", "status"), [("/props", 429), ("/props", 500), ("/props", 503), ("/v1/rerank", 503)])
def test_a_server_that_is_still_loading_is_not_taken_for_another_engine_or_task(page, status):
    pages = {"/v1/models": {"data": [{"id": "listed"}]}, "/props": PAGES["/props"]}
    pages.pop(page, None)
    with (
        serving(lambda path, _: pages.get(path, Reply(LOADING, status))) as server,
        pytest.raises(NetworkError, match=f"^{server.url}{page} answered {status}: Loading model"),
    ):
        open_http(server.url, QUICK)


def test_a_page_that_stumbles_over_an_empty_question_is_there():
    answer = jina(lambda *_: results(0.5))
    with (
        serving(lambda path, body: answer(path, body) if body else Reply({}, 500) if body == {} else None) as server,
        open_http(server.url, QUICK) as scorer,
    ):
        assert scorer.task is Task.RERANK
        assert scorer.score(many(1)) == [0]


@pytest.mark.parametrize("kind", [None, ServerKind.VLLM, ServerKind.TEI])
def test_an_address_without_a_known_page_is_no_embedder(kind):
    with (
        serving(lambda *_: None) as server,
        pytest.raises(ModelError, match=f"{server.url} has no endpoint of a scoring server"),
    ):
        open_http(server.url, HttpOptions(engine=kind, model="m"))


def test_a_page_that_is_missing_for_a_reason_gives_the_reason():
    absent = Reply({"error": {"message": "The model `foo` does not exist."}}, 404)
    reason = r"query 'q0', document 'd': .*/{} answered 404: The model `foo` does not exist\."
    for kind, page in (
        (ServerKind.VLLM, "score"),
        (ServerKind.JINA, "v1/rerank"),
        (ServerKind.LLAMA_SERVER, "v1/rerank"),
    ):
        options = HttpOptions(engine=kind, model="foo", task=Task.RERANK)
        with (
            serving(lambda *_: absent) as server,
            open_http(server.url, options) as scorer,
            pytest.raises(ModelError, match=reason.format(page)),
        ):
            scorer.score(many(1))


PICTURED = Pair(Item("q", ("q",)), Item("seen", image=(Image.new("RGB", (64, 64)),)))
FILMED = Pair(Item("q", ("q",)), Item("film", video=(Video("film.mp4"),)))
ASKED = Pair(Item("q", ("q",), instruction="Judge the colour."), Item("d", ("d",)))


@pytest.mark.parametrize(
    ("kind", "pair", "message"),
    [
        (ServerKind.JINA, PICTURED, "Item 'seen' contains a picture"),
        (ServerKind.TEI, PICTURED, "Item 'seen' contains a picture"),
        (ServerKind.LLAMA_SERVER, PICTURED, "Item 'seen' contains a picture. llama-server's /v1/rerank takes texts"),
        (ServerKind.JINA, ASKED, "query 'q', document 'd': .*takes no instruction"),
        (ServerKind.LLAMA_SERVER, ASKED, "query 'q', document 'd': .*by the instruction in its GGUF file"),
        (ServerKind.TEI, ASKED, "no place for an instruction"),
        (ServerKind.LLAMA_SERVER, Pair(Item("q", ("{document}",)), Item("d", ("d",))), "contains {document}"),
        (ServerKind.LLAMA_SERVER, Pair(Item("q", ("q",)), Item("none")), "Item 'none' is empty"),
        *((kind, FILMED, "Item 'film' contains a video") for kind in ServerKind),
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
        if path != "/v1/embeddings":
            return None
        return {"data": [{"embedding": vectors[body["input"]]}]} if body else Reply({}, 400)

    options = HttpOptions(model="m", family="qwen3", retries=0, concurrency=1)
    with serving(answer) as server:
        with (
            open_http(server.url, HttpOptions(model="m")) as scorer,
            pytest.raises(UsageError, match="prompt of an item depends on the model"),
        ):
            scorer.embed([Item("i", ("ok",))])
        with open_http(server.url, options) as scorer:
            np.testing.assert_allclose(scorer.embed([Item("i", ("ok",))]), [[0.6, 0.8]])
            assert scorer.query_instruction == TEXT_EMBEDDER.query_instruction
            for broken in ("zero", "nan", "null", "none"):
                reported = {}
                with pytest.raises(ModelError, match=f"item '{broken}': .*vector"):
                    scorer.embed([Item("i", ("ok",)), Item(broken, (broken,))], reported.__setitem__)
                assert set(reported) == {0}


def test_tei_gets_the_official_prompt_in_two_halves_and_answers_in_log_odds():
    info = dict(PAGES["/info"])

    def answer(path, body):
        if path == "/info":
            return info
        if path == "/embed":
            return [[float(len(body["inputs"][0])), 0.0]]
        return [{"index": 1, "score": -3.5}, {"index": 0, "score": 12.25}] if path == "/rerank" else None

    asked = [Pair(Item("q", ("Q",), instruction="Find."), Item(name, (name,))) for name in ("a", " b")]
    with serving(answer) as server:
        with open_http(server.url, HttpOptions(family="qwen3")) as scorer:
            assert scorer.score(asked) == [12.25, -3.5]
        info["model_type"] = {"embedding": {"pooling": "last"}}
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


BLANK, NONE = Item("blank", ("",)), Item("none")


def test_an_empty_text_is_not_a_missing_one_in_the_prompts_that_tei_gets():
    def answer(path, body):
        if path == "/embed":
            return [[1.0]]
        return [{"index": place, "score": 1} for place in range(len(body["texts"]))] if path == "/rerank" else None

    def options(task):
        return HttpOptions(engine=ServerKind.TEI, model="m", family="qwen3_vl", task=task)

    with serving(answer) as server:
        with open_http(server.url, options(Task.RERANK)) as scorer:
            scorer.score([Pair(BLANK, BLANK), Pair(NONE, NONE)])
        with open_http(server.url, options(Task.EMBED)) as scorer:
            scorer.embed([BLANK, NONE])
        prompts = {body["query"] + body["texts"][0] for body in server.bodies("/rerank")}
        embedded = {body["inputs"][0] for body in server.bodies("/embed")}
    judged, shown = VL_RERANKER.default_instruction, VL_EMBEDDER.default_instruction
    sides = ("", "NULL")
    assert prompts == {VL_RERANKER.template.format(instruction=judged, query=side, document=side) for side in sides}
    assert embedded == {VL_EMBEDDER.template.format(instruction=shown, content=side) for side in sides}


def test_an_empty_text_is_refused_where_the_servers_own_template_takes_it_for_a_missing_one():
    def options(family):
        return HttpOptions(engine=ServerKind.JINA, model="m", family=family, task=Task.RERANK)

    with serving(lambda *_: {"results": [{"index": 0, "relevance_score": 0.5}]}) as server:
        for pair in (Pair(BLANK, Item("d", ("d",))), Pair(Item("q", ("q",)), BLANK)):
            with (
                open_http(server.url, options("qwen3_vl")) as scorer,
                pytest.raises(UsageError, match="Item 'blank' is an empty text"),
            ):
                scorer.score([pair])
            with open_http(server.url, options("qwen3")) as scorer:  # whose prompt has one word for both, which is none
                assert scorer.score([pair]) == [0]
