"""What vLLM is sent and how its answers are read, on a small server with vLLM's interface; the real one is among the engines."""

from __future__ import annotations

import base64
import threading
from io import BytesIO

import numpy as np
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from qtool import resources
from qtool.arch.prompts import VL_EMBEDDER, VL_RERANKER, rerank_template
from qtool.arch.spec import Task
from qtool.errors import ModelError, UsageError
from qtool.inputs.items import Item, Pair, PixelLimits
from qtool.scoring.http.detect import ServerKind
from qtool.scoring.http.runtime import HttpOptions, open_http
from qtool.scoring.prompt import PromptBuilder
from qtool.scoring.scorer import log_odds, sigmoid
from qtool.scoring.tokenizer import PromptTokenizer
from tests.scoring.servers import Reply, serving

TOKENIZER = PromptTokenizer.read(resources.demo_model("qtool-demo-reranker"))
OPTIONS = HttpOptions(family="qwen3_vl", retries=0)
OFFICIAL = rerank_template(VL_RERANKER)
DEAF = OFFICIAL.replace("instruction|default", "nothing|default")


def pair(document="d", instruction=None):
    return Pair(Item("q", ("which ball?",), instruction=instruction), Item(document, (document,)))


def vllm(template=OFFICIAL, activation=sigmoid, *, knows_raw=True):
    """A server that scores a prompt by its number of tokens, and says how many it read."""

    def prompt(sides, body):
        if template is None:
            return "".join(sides.values())
        messages = [{"role": role, "content": text} for role, text in sides.items()]
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        return made.render(messages=messages, **body.get("chat_template_kwargs", {}))

    def score(body):
        prompts = [prompt({"query": body["text_1"], "document": text}, body) for text in body["text_2"]]
        raw = [len(TOKENIZER.encode(text)) / 50 for text in prompts]
        is_raw = knows_raw and body.get("use_activation") is False
        data = [{"index": place, "score": value if is_raw else activation(value)} for place, value in enumerate(raw)]
        return {"data": data, "usage": {"prompt_tokens": sum(len(TOKENIZER.encode(text)) for text in prompts)}}

    def tokenize(body):
        if "prompt" in body:
            return {"tokens": TOKENIZER.encode(body["prompt"])}
        sides = {message["role"]: message["content"][0]["text"] for message in body["messages"]}
        return {"tokens": TOKENIZER.encode(prompt(sides, body) if template else "a chat template of another kind")}

    def answer(path, body):
        if path == "/classify":
            return Reply({}, 400)
        pages = {"/version": {"version": "0.33.0"}, "/v1/models": {"data": [{"id": "served"}]}}
        return (
            {"/score": score, "/tokenize": tokenize}[path](body) if path in ("/score", "/tokenize") else pages.get(path)
        )

    return answer


def test_scores_are_log_odds_that_no_float_has_rounded():
    with serving(vllm()) as server, open_http(server.url, OPTIONS) as scorer:
        scores = scorer.score([pair("d"), pair("a longer document")])
        assert server.bodies("/score")[-1]["use_activation"] is False
        assert {body["model"] for body in server.bodies("/score")} == {"served"}
    builder = PromptBuilder(TOKENIZER, VL_RERANKER)
    assert scores == [len(builder.pair(each).token_ids) / 50 for each in (pair("d"), pair("a longer document"))]


def test_a_server_that_knows_no_raw_scores_is_asked_for_probabilities():
    with serving(vllm()) as server, open_http(server.url, OPTIONS) as scorer:
        raw = scorer.score([pair()])
    with serving(vllm(knows_raw=False)) as server, open_http(server.url, OPTIONS) as scorer:
        assert scorer.score([pair()]) == [log_odds(sigmoid(raw[0]))]


def test_a_head_that_gives_something_else_is_found_out():
    with (
        serving(vllm(activation=lambda raw: raw / 10)) as server,
        open_http(server.url, OPTIONS) as scorer,
        pytest.raises(ModelError, match=r"query 'q', document 'd': .*not a probability and its log-odds") as caught,
    ):
        scorer.score([pair()])
    assert "serve-command" in caught.value.hint


def test_an_empty_text_is_refused_since_the_template_writes_null_for_it():
    with serving(vllm()) as server, open_http(server.url, OPTIONS) as scorer:
        assert len(scorer.score([Pair(Item("q", ("ball",)), Item("none"))])) == 1
        with pytest.raises(UsageError, match="Item 'blank' is an empty text"):
            scorer.score([Pair(Item("q", ("ball",)), Item("blank", ("",)))])


def test_an_instruction_reaches_the_prompt_or_is_refused():
    asked = pair(instruction="Judge by colour alone, please.")
    with serving(vllm()) as server, open_http(server.url, OPTIONS) as scorer:
        (score,) = scorer.score([asked])
        seen = scorer.prompt_seen(asked)
    official = PromptBuilder(TOKENIZER, VL_RERANKER).pair(asked).token_ids
    assert score == len(official) / 50
    assert seen.token_ids == official
    for template in (DEAF, None):
        with (
            serving(vllm(template)) as server,
            open_http(server.url, OPTIONS) as scorer,
            pytest.raises(UsageError, match="does not put an instruction into its prompt"),
        ):
            scorer.score([pair(), asked])


def test_without_a_template_the_bare_sides_are_seen():
    with serving(vllm(None)) as server, open_http(server.url, OPTIONS) as scorer:
        assert scorer.prompt_seen(pair()).token_ids == tuple(TOKENIZER.encode("which ball?d"))


def test_a_prompt_that_tokenize_does_not_know_is_not_made_up():
    answer = vllm()
    lying = {"tokens": [1, 2, 3]}
    for reported in (lying, None):
        with (
            serving(lambda path, body: reported if path == "/tokenize" else answer(path, body)) as server,  # noqa: B023
            open_http(server.url, OPTIONS) as scorer,
        ):
            assert scorer.prompt_seen(pair()) is None


def decoded(part):
    return Image.open(BytesIO(base64.b64decode(part["image_url"]["url"].removeprefix("data:image/png;base64,"))))


def test_pictures_go_before_the_text_on_the_official_grid_with_the_official_limits():
    seen = Item("d", ("one ", "text"), (Image.new("RGB", (700, 33), "red"), Image.new("RGBA", (20, 20))))
    body_of = {}

    def answer(path, body):
        body_of[path] = body
        return {"data": [{"index": 0, "score": 0.5}]} if path == "/score" else vllm()(path, body)

    with serving(answer) as server, open_http(server.url, OPTIONS) as scorer:
        assert scorer.score([Pair(Item("q"), seen)]) == [0]
    body = body_of["/score"]
    (document,) = body["text_2"]
    assert body["text_1"] == ""  # for which the template writes NULL
    assert [part["type"] for part in document["content"]] == ["image_url", "image_url", "text"]
    assert [decoded(part).size for part in document["content"][:2]] == [(704, 32), (64, 64)]
    assert document["content"][2]["text"] == "one text"
    assert "mm_processor_kwargs" not in body  # a vLLM that does not trust its clients refuses it


def test_an_embedders_items_are_messages_with_the_instruction_as_system():
    picture = Item("i", image=(Image.new("RGB", (64, 64)),), instruction="Find it")

    def answer(path, body):
        if path == "/v1/embeddings":
            return {"data": [{"embedding": [0, 2]}], "usage": {"prompt_tokens": 3}} if body else Reply({}, 400)
        return {"/version": {"version": "1"}, "/tokenize": {"tokens": [5, 6, 7]}}.get(path)

    with serving(answer) as server, open_http(server.url, OPTIONS) as scorer:
        assert scorer.task is Task.EMBED
        np.testing.assert_array_equal(scorer.embed([picture, Item("empty")]), [[0, 1], [0, 1]])
        seen = scorer.prompt_seen(picture)
        bodies = server.bodies("/v1/embeddings")
        scorer.embed([Item("blank", ("",))])
        blank = server.bodies("/v1/embeddings")[-1]
    of_kind = {body["messages"][1]["content"][0]["type"]: body for body in bodies if body}
    pictured, empty = of_kind["image_url"], of_kind["text"]
    assert pictured["messages"][0] == {"role": "system", "content": [{"type": "text", "text": "Find it."}]}
    assert pictured["messages"][1]["content"][0]["type"] == "image_url"
    assert pictured["add_generation_prompt"] is True
    assert empty["messages"][0]["content"][0]["text"] == VL_EMBEDDER.default_instruction
    assert empty["messages"][1]["content"] == [{"type": "text", "text": "NULL"}]
    assert blank["messages"][1]["content"] == [{"type": "text", "text": ""}]  # as the official class writes it
    assert (seen.token_ids, seen.grids) == ((5, 6, 7), ((1, 4, 4),))


def test_the_grid_is_that_of_the_picture_as_it_was_sent_and_as_the_server_resizes_it():
    def answer(path, body):
        if path == "/v1/embeddings":
            return {"data": [{"embedding": [1]}], "usage": {"prompt_tokens": 1}} if body else Reply({}, 400)
        return {"/version": {"version": "1"}, "/tokenize": {"tokens": [5]}}.get(path)

    def grid(limits):
        (found,) = scorer.prompt_seen(Item("i", image=(Image.new("RGB", (256, 192)),), limits=limits)).grids
        return found

    with serving(answer) as server, open_http(server.url, OPTIONS) as scorer:
        assert grid(PixelLimits()) == (1, 12, 16)
        assert grid(PixelLimits(max_pixels=128 * 96)) == (1, 6, 8)
        assert grid(PixelLimits(min_pixels=32 * 32, max_pixels=64 * 32)) == (1, 4, 4)  # which the server enlarges


def test_what_is_asked_after_a_first_score_is_tried_again_too():
    answer, busy = vllm(), threading.Event()

    def flaky(path, body):
        if path == "/score" and busy.is_set():
            busy.clear()
            return Reply("busy", 503)
        return answer(path, body)

    with serving(flaky) as server, open_http(server.url, HttpOptions(family="qwen3_vl", retries=1)) as scorer:
        first = scorer.score([pair()])
        busy.set()
        assert scorer.prompt_seen(pair()) is not None
        busy.set()
        assert scorer.score([pair()]) == first


def lazy_picture(content, threads):
    """A picture that is read when first needed, as Image.open gives it, and says by which thread."""
    picture = Image.open(BytesIO(content))
    read = picture.load

    def load():
        threads.append(threading.current_thread())
        return read()

    picture.load = load
    return picture


def stored(picture):
    target = BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()


def test_a_picture_in_memory_is_decoded_before_several_threads_share_it():
    threads = []
    picture = lazy_picture(stored(Image.new("RGB", (64, 64))), threads)
    items = [Item(f"i{place}", image=(picture,)) for place in range(3)]
    embedding = {"data": [{"index": 0, "embedding": [0, 1]}], "usage": {"prompt_tokens": 1}}
    with serving(lambda path, _: embedding if path == "/v1/embeddings" else Reply({}, 400)) as server:
        options = HttpOptions(family="qwen3_vl", retries=0, task=Task.EMBED, engine=ServerKind.VLLM, model="m")
        with open_http(server.url, options) as scorer:
            scorer.embed(items)
    assert threads[0] is threading.main_thread()


def test_a_broken_picture_in_memory_is_named_before_anything_is_asked():
    whole = stored(Image.effect_noise((64, 64), 50))
    item = Item("cut", image=(Image.open(BytesIO(whole[:2000])),))
    with serving(lambda *_: Reply({}, 400)) as server:
        options = HttpOptions(family="qwen3_vl", retries=0, task=Task.EMBED, engine=ServerKind.VLLM, model="m")
        with open_http(server.url, options) as scorer, pytest.raises(UsageError, match="Item 'cut': Cannot read"):
            scorer.embed([item])
