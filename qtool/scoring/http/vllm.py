"""vLLM over HTTP: /score for pairs, /v1/embeddings for items.

The server's own chat template writes the prompt, since that is what its users get; it is sent sides, pictures and the
instruction as data. Pictures are sent on the official grid. vLLM refuses pixel limits in a request (400), so its own
apply, which `qtool serve-command` sets.

From vLLM's source (0.32), `entrypoints/pooling`: /score renders messages of the roles query and document with
--chat-template, or concatenates them without one; `use_activation: false` gives log-odds; texts of one side are joined
by newlines, so each side is sent as one text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from typing_extensions import override

from qtool.errors import UsageError
from qtool.inputs.items import OFFICIAL_LIMITS, ImageSource, Item, Pair, smart_resize
from qtool.inputs.pictures import load_image
from qtool.scoring.http.engine import (
    DeafError,
    HttpEngine,
    ScaleError,
    check_empty_is_missing,
    check_no_video,
    ids_of,
    item_name,
    known_prompt,
    picture_url,
    probabilities_as_log_odds,
    raw_vector_of,
    request_name,
    scores_of,
    tokens_read,
    vector_of,
)
from qtool.scoring.prompt import embed_instruction
from qtool.scoring.scorer import PromptSeen, sigmoid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qtool.arch.prompts import PromptSpec
    from qtool.arch.spec import Task
    from qtool.scoring.http.client import HttpClient

_ACTIVATION_ERROR: Final = 0.01
"""bf16 rounds a probability by up to 0.002; an activation other than the sigmoid is further off."""


class Vllm(HttpEngine):
    """vLLM. `prompt` is needed for items only: the prompt of a pair is written by the server's template."""

    def __init__(self, client: HttpClient, model: str, prompt: PromptSpec | None) -> None:
        self._client = client
        self._model = {"model": model} if model else {}
        self._prompt = prompt
        self._gives_log_odds = False

    @override
    def texts_only(self, task: Task) -> str:
        """Empty: it takes whatever its model does."""
        del task
        return ""

    @override
    def check_pair(self, pair: Pair) -> None:
        check_no_video(pair.query)
        check_no_video(pair.document)
        check_empty_is_missing(pair, "vLLM's template")

    @override
    def check_item(self, item: Item) -> None:
        check_no_video(item)
        prompt = known_prompt(self._prompt, "The prompt of an item depends on the model")
        if item.image and not prompt.sees_pictures:
            raise UsageError(
                f"{item.name} contains a picture; the model reads text only.", "Choose a text panel for this model."
            )

    @override
    def prepare(self, pairs: Sequence[Pair]) -> None:
        """Find out whether the server can return log-odds, and whether its prompt takes an instruction."""
        if pairs:
            self._gives_log_odds = self._scale_is_log_odds(pairs[0])
        instructed = next((pair for pair in pairs if pair.query.instruction), None)
        if instructed is not None and not self._takes_instructions(instructed):
            raise DeafError(
                f"{instructed.name}: The server at {self._client.url} does not put an instruction into its prompt.",
                "Serve it by vLLM 0.22 or later with the chat template that qtool writes, which reads `instruction`.",
            )

    @override
    def ask(self, pairs: Sequence[Pair]) -> Any:
        return self._score(pairs)

    @override
    def rank(self, pairs: Sequence[Pair]) -> list[float]:
        return self._rank(pairs)

    @override
    def rank_uncached(self, pairs: Sequence[Pair]) -> list[float]:
        """A prefix of another salt is not found in vLLM's cache."""
        return self._rank(pairs, cache_salt=uuid4().hex)

    @override
    def heeds_instructions(self, pair: Pair) -> bool:
        return self._takes_instructions(pair)

    def _rank(self, pairs: Sequence[Pair], **more: Any) -> list[float]:
        name = request_name(pairs)
        scores = scores_of(name, self._score(pairs, use_activation=not self._gives_log_odds, **more), len(pairs))
        return scores if self._gives_log_odds else probabilities_as_log_odds(name, scores)

    @override
    def embed(self, item: Item) -> NDArray[np.float64]:
        return vector_of(item_name(item), self._embedding(item))

    @override
    def vector(self, item: Item) -> NDArray[np.float64]:
        return raw_vector_of(item_name(item), self._embedding(item))

    @override
    def prompt_seen(self, question: Pair | Item) -> PromptSeen | None:
        """The ids from /tokenize for a prompt with as many tokens as the scored one had; None if there is none."""
        if isinstance(question, Pair):
            name, count = question.name, tokens_read(self._score([question]))
        else:
            name, count = item_name(question), tokens_read(self._embedding(question))
        for body in self._tokenizations(question):
            answer = self._client.post_if_supported(name, "/tokenize", self._model | body)
            ids = ids_of(answer)
            if ids is not None and len(ids) == count:
                return PromptSeen(tuple(ids), tuple(_grids(question)))
        return None

    def _scale_is_log_odds(self, pair: Pair) -> bool:
        (activated,) = scores_of(pair.name, self._score([pair]), 1)
        (raw,) = scores_of(pair.name, self._score([pair], use_activation=False), 1)
        if activated == raw or math.isnan(activated):  # an older vLLM, or NaN, which `rank` will report
            return False
        if abs(sigmoid(raw) - activated) > _ACTIVATION_ERROR:
            raise ScaleError(
                f"{pair.name}: {self._client.url} scores {activated:g}, and {raw:g} without its activation; "
                "these are not a probability and its log-odds.",
                "Serve with the classifier made from the tokens [no, yes], as `qtool serve-command` shows.",
            )
        return True

    def _takes_instructions(self, pair: Pair) -> bool:
        """Whether an instruction of one letter gives the prompt another length than the template's default."""
        lengths = [
            tokens_read(self._score([Pair(pair.query.with_instruction(instruction), pair.document)]))
            for instruction in (None, "x")
        ]
        return lengths[0] != lengths[1]

    def _score(self, pairs: Sequence[Pair], **more: Any) -> Any:
        query, documents = pairs[0].query, [pair.document for pair in pairs]
        body = {"text_1": _side(query), "text_2": [_side(document) for document in documents], **_instructed(query)}
        return self._client.post(request_name(pairs), "/score", self._model | body | more)

    def _embedding(self, item: Item) -> Any:
        body = {**self._item_body(item), "encoding_format": "float"}
        return self._client.post(item_name(item), "/v1/embeddings", self._model | body)

    def _item_body(self, item: Item) -> Mapping[str, Any]:
        prompt = known_prompt(self._prompt, "The prompt of an item depends on the model")
        instruction = embed_instruction(item.instruction, prompt)
        if not prompt.sees_pictures:
            template = prompt.template if instruction else prompt.bare_template
            return {"input": template.format(instruction=instruction, content=item.joined_text)}
        # An empty text counts as text; `empty_side` is for items that have none.
        content = _parts(item) or [{"type": "text", "text": "" if item.text else prompt.empty_side}]
        system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
        return {"messages": [system, {"role": "user", "content": content}], "add_generation_prompt": True}

    def _tokenizations(self, question: Pair | Item) -> list[dict[str, Any]]:
        """Bodies for /tokenize: rendered by the served template, and the sides as /score concatenates them without one."""
        if isinstance(question, Item):
            body = dict(self._item_body(question))
            return [{"prompt": body["input"]} if "input" in body else body]
        query, document = question.query, question.document
        roles = (("query", query), ("document", document))
        messages = [{"role": role, "content": _parts(item) or [{"type": "text", "text": ""}]} for role, item in roles]
        options = {"add_generation_prompt": False, "add_special_tokens": True, **_instructed(query)}
        return [{"messages": messages, **options}, {"prompt": query.joined_text + document.joined_text}]


def _side(item: Item) -> Any:
    return {"content": _parts(item)} if item.image else item.joined_text


def _parts(item: Item) -> list[Mapping[str, Any]]:
    """The item's pictures, then its text, as parts of a message."""
    urls = (picture_url(item, source) for source in item.image)
    pictures: list[Mapping[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*pictures, *([{"type": "text", "text": item.joined_text}] if item.joined_text else [])]


def _instructed(query: Item) -> Mapping[str, Any]:
    return {"chat_template_kwargs": {"instruction": query.instruction}} if query.instruction else {}


def _grids(question: Pair | Item) -> Iterator[tuple[int, int, int]]:
    for item in (question.query, question.document) if isinstance(question, Pair) else (question,):
        yield from (_grid(item, source) for source in item.image)


def _grid(item: Item, source: ImageSource) -> tuple[int, int, int]:
    """The grid that the server makes, by the official limits, of the picture as it is sent."""
    picture = load_image(source)
    rows, columns = smart_resize(*smart_resize(picture.height, picture.width, item.limits))
    return 1, rows // OFFICIAL_LIMITS.patch, columns // OFFICIAL_LIMITS.patch
