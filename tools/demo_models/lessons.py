"""The training examples: wishes, graded documents in words and pictures, and dense targets, of scenes that are not held out.

Match labels alone teach nothing in a thousand steps; a target (a verdict or a word) at every token that could know it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tokenizers import Tokenizer

from qtool.arch.prompts import IMAGE_PAD, VISION_END
from qtool.inputs.pictures import PatchedImage, patchify
from tools.demo_models.forward import BETWEEN, TAIL, Part, encode_part, last_token_of, side_prompt
from tools.demo_models.pictures import render
from tools.demo_models.tokenizer import canonical_token
from tools.demo_models.world import (
    ATTRIBUTES,
    WORDS,
    Phrase,
    Scene,
    Wish,
    document_sentence,
    query_sentence,
    sample_document,
    sample_wish,
)

# Chances of a document's form; pictures are the hard part and get the most practice.
FORMS = ("picture", "text", "both")
# Position is left to the token right after a picture; the other four go to the tail's first four tokens.
TAIL_ATTRIBUTES = ("count", "size", "colour", "shape")


@dataclass(frozen=True)
class Document:
    """A scene as a document of one form: a sentence, a picture, or a picture with a partial caption."""

    scene: Scene
    phrase: Phrase
    picture: PatchedImage | None


@dataclass(frozen=True)
class Lesson:
    """One query with its documents; all encoded with targets."""

    wish: Wish
    query: Part
    scenes: list[Scene]
    documents: list[Part]


def draw_document(random: Random, scene: Scene, form: str) -> Document:
    """A scene in the wanted form."""
    if form == "text":
        return Document(scene, document_sentence(random, scene), None)
    picture = patchify(render(random, scene))
    if form == "picture":
        return Document(scene, Phrase("", {}), picture)
    stated = set(random.sample(ATTRIBUTES, random.choice((2, 3))))
    ordered = [name for name in ATTRIBUTES if name in stated]
    return Document(scene, document_sentence(random, scene, ordered), picture)


class Teacher:
    """Draws lessons from one seed; `form_weights` are the chances of picture, text and both."""

    def __init__(self, tokenizer: Tokenizer, seed: int, form_weights: tuple[float, float, float]) -> None:
        self._tokenizer = tokenizer
        self._random = Random(seed)
        self.form_weights = form_weights
        self._words = {
            (name, value): canonical_token(tokenizer, name, value) for name in WORDS for value in WORDS[name]
        }

    def rerank_lesson(self, documents: int) -> Lesson:
        """A query and documents of evenly spread grades; verdicts wherever an attribute is known."""
        wish = sample_wish(self._random, held_out=False)
        scenes = [self._graded(wish) for _ in range(documents)]
        parts = [self._document(scene, wish) for scene in scenes]
        return Lesson(wish, self._query(wish, BETWEEN, worded_tail=False), scenes, parts)

    def embed_lesson(self, documents: int) -> Lesson:
        """A query and documents, each a prompt of its own; every known attribute's word is a target."""
        wish = sample_wish(self._random, held_out=False)
        scenes = [self._graded(wish) for _ in range(documents)]
        query = self._query(wish, TAIL, worded_tail=True)
        return Lesson(wish, query, scenes, [self._document(scene, None) for scene in scenes])

    def _graded(self, wish: Wish) -> Scene:
        label = self._random.randint(0, len(wish.asked))
        return sample_document(self._random, wish, label, held_out=False)

    def _query(self, wish: Wish, after: str, *, worded_tail: bool) -> Part:
        """Each attribute word of a query has its canonical word as target, in the tail too if wanted."""
        phrase = query_sentence(self._random, wish)
        part = encode_part(self._tokenizer, phrase.text + after)
        places = last_token_of(self._tokenizer, phrase.text + after, phrase.spans)
        known = {name: self._words[name, wish.scene[name]] for name in wish.asked}
        if worded_tail:
            part.words.update({at: known[name] for name, at in self._tail_places(part).items() if name in known})
        part.words.update({at: known[name] for name, at in places.items()})
        return part

    def _document(self, scene: Scene, wish: Wish | None) -> Part:
        """Words at pictures always; elsewhere verdicts when there is a wish to judge by, else words."""
        form = self._random.choices(FORMS, self.form_weights)[0]
        document = draw_document(self._random, scene, form)
        prompt = side_prompt(document.phrase.text, document.picture)
        part = encode_part(self._tokenizer, prompt + TAIL, document.picture)
        offset = len(prompt) - len(document.phrase.text)
        places = last_token_of(self._tokenizer, prompt + TAIL, document.phrase.shifted(offset))
        self._set(part, scene, wish, self._tail_places(part))
        self._set(part, scene, wish, places)
        self._caption(part, scene, wish)
        return part

    def _set(self, part: Part, scene: Scene, wish: Wish | None, places: dict[str, int]) -> None:
        if wish is None:
            part.words.update({index: self._words[name, scene[name]] for name, index in places.items()})
            return
        matches = wish.matches(scene)
        part.verdicts.update({index: float(matches[name]) for name, index in places.items() if name in matches})

    def _tail_places(self, part: Part) -> dict[str, int]:
        first = len(part.ids) - len(self._tokenizer.encode(TAIL).ids)
        return {name: first + step for step, name in enumerate(TAIL_ATTRIBUTES)}

    def _caption(self, part: Part, scene: Scene, wish: Wish | None) -> None:
        """Each picture token names one attribute in turn; the token behind the picture handles position."""
        if part.picture is None:
            return
        pad, end = (self._tokenizer.token_to_id(token) for token in (IMAGE_PAD, VISION_END))
        for step in range(part.picture.placeholder_tokens):
            name = ATTRIBUTES[step % len(ATTRIBUTES)]
            part.words[part.ids.index(pad) + step] = self._words[name, scene[name]]
        self._set(part, scene, wish, {"position": part.ids.index(end)})
