"""The world in words: query paraphrases and document sentences, with every attribute word marked.

Rule: a phrase knows where its attribute words are, so that training can ask at each of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from qtool.demo.world import WORDS, Scene, Wish

# {count}, {size}, {colour} are words; {shape} is a noun in its number; {position} a phrase of place.
DOCUMENT_TEMPLATES = (
    "{count} {size} {colour} {shape} {position}",
    "There is a picture of {count} {size} {colour} {shape} {position}.",
    "A drawing with {count} {colour} {shape}, {size}, {position}.",
    "{position} one sees {count} {size} {colour} {shape}.",
    "The scene shows {count} {shape}: {size} and {colour}, {position}.",
    "It has {colour} {shape}, {count} in number, {size} and {position}.",
    "Painted {position}: {count} {size} {shape} in {colour}.",
)
QUERY_OPENINGS = (
    "",
    "find ",
    "show me ",
    "a picture with ",
    "looking for ",
    "I want ",
    "where are ",
    "search for an image of ",
)
PLACE_FIRST = 0.2
PLACE_TEMPLATES = {
    "top": "at the top",
    "above": "up above",
    "bottom": "at the bottom",
    "below": "down below",
    "left": "on the left",
    "west": "to the west",
    "right": "on the right",
    "east": "to the east",
    "middle": "in the middle",
    "centre": "at the centre",
}


@dataclass(frozen=True)
class Phrase:
    """A text and, for each attribute it names, the character span of the words that decide it."""

    text: str
    spans: dict[str, tuple[int, int]]

    def shifted(self, offset: int) -> dict[str, tuple[int, int]]:
        """The spans when the text starts at character `offset` of a longer text."""
        return {name: (start + offset, end + offset) for name, (start, end) in self.spans.items()}


def document_sentence(random: Random, scene: Scene, stated: Sequence[str] | None = None) -> Phrase:
    """A description of a scene: full by a sentence template, or partial (`stated` attributes) in query order."""
    if stated is not None:
        return _fill(_part_template(stated), _worder(random, scene))
    return _fill(random.choice(DOCUMENT_TEMPLATES), _worder(random, scene))


def query_sentence(random: Random, wish: Wish) -> Phrase:
    """A request for what the wish mentions, in one of many phrasings."""
    word = _worder(random, wish.scene)
    if "position" in wish.asked and random.random() < PLACE_FIRST:
        rest = tuple(name for name in wish.asked if name != "position")
        return _fill("{position}, " + _part_template(rest), word)
    return _fill(random.choice(QUERY_OPENINGS) + _part_template(wish.asked), word)


def _part_template(asked: Sequence[str]) -> str:
    """A noun phrase of the attributes asked for; what has no shape is called "things"."""
    words = [f"{{{name}}}" for name in ("count", "size", "colour") if name in asked]
    words.append("{shape}" if "shape" in asked else "things")
    return " ".join(words + (["{position}"] if "position" in asked else []))


def _worder(random: Random, scene: Scene) -> Callable[[str], str]:
    plural = scene.count != "one"

    def word(attribute: str) -> str:
        chosen = random.choice(WORDS[attribute][scene[attribute]])
        if attribute == "shape":
            return plural_of(chosen) if plural else chosen
        return PLACE_TEMPLATES[chosen] if attribute == "position" else chosen

    return word


def plural_of(noun: str) -> str:
    """The plural of a shape word."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _fill(template: str, word: Callable[[str], str]) -> Phrase:
    text, spans = "", {}
    for piece in re.split(r"(\{\w+\})", template):
        name = piece.strip("{}") if piece.startswith("{") else ""
        filled = word(name) if name else piece
        if name:
            spans[name] = (len(text), len(text) + len(filled))
        text += filled
    return Phrase(text[:1].upper() + text[1:] if template.endswith(".") else text, spans)
