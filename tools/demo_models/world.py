"""A small world of graded attributes: scenes, how well one meets a wish, and what they are called."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

# A small world of graded attributes: scenes, what they are called, how well one meets a wish. Everything follows from
# a seed, and a scene is either for training or held out.


HELD_OUT_PERCENT = 25
TRIES = 500

# Attribute → value → words for it; the first word is the canonical one, a single token.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "count": {
        "one": ("one", "a single", "1"),
        "two": ("two", "a pair of", "2"),
        "three": ("three", "a trio of", "3"),
        "four": ("four", "a quartet of", "4"),
    },
    "size": {
        "small": ("small", "tiny", "little"),
        "large": ("large", "big", "huge"),
    },
    "colour": {
        "red": ("red", "crimson"),
        "orange": ("orange", "amber"),
        "yellow": ("yellow", "lemon"),
        "green": ("green", "emerald"),
        "blue": ("blue", "azure"),
        "purple": ("purple", "violet"),
        "white": ("white", "snowy"),
        "black": ("black", "jet"),
    },
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle", "wedge"),
        "star": ("star", "asterisk"),
        "cross": ("cross", "plus"),
        "ring": ("ring", "hoop"),
    },
    "position": {
        "top": ("top", "above"),
        "bottom": ("bottom", "below"),
        "left": ("left", "west"),
        "right": ("right", "east"),
        "middle": ("middle", "centre"),
    },
}
ATTRIBUTES: tuple[str, ...] = tuple(WORDS)


@dataclass(frozen=True, order=True)
class Scene:
    """What a document shows: one value of each attribute, indexable by attribute name."""

    count: str
    size: str
    colour: str
    shape: str
    position: str

    def __getitem__(self, attribute: str) -> str:
        return str(getattr(self, attribute))


@dataclass(frozen=True)
class Wish:
    """What a query asks for: a scene of which only `asked` attributes are mentioned."""

    scene: Scene
    asked: tuple[str, ...]

    def matches(self, document: Scene) -> dict[str, bool]:
        """For each attribute asked for, whether the document has it."""
        return {name: self.scene[name] == document[name] for name in self.asked}

    def label(self, document: Scene) -> int:
        """The graded relevance: how many of the asked attributes match."""
        return sum(self.matches(document).values())

    def fraction(self, document: Scene) -> float:
        """The graded relevance as a share of what was asked, 0 to 1."""
        return self.label(document) / len(self.asked)


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene of the world, in a fixed order."""
    return tuple(Scene(*values) for values in itertools.product(*WORDS.values()))


@cache
def is_held_out(scene: Scene) -> bool:
    """Whether panels may use the scene (and training may not); by a hash, so that it never moves."""
    digest = hashlib.sha256(" ".join(scene[name] for name in ATTRIBUTES).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


@cache
def scenes(*, held_out: bool) -> tuple[Scene, ...]:
    """The scenes of one side of the split."""
    return tuple(scene for scene in all_scenes() if is_held_out(scene) == held_out)


def sample_wish(random: Random, *, held_out: bool) -> Wish:
    """A wish that mentions three to five attributes; longer wishes are drawn more often."""
    scene = random.choice(scenes(held_out=held_out))
    mentioned = set(random.sample(ATTRIBUTES, random.choice((3, 4, 4, 5, 5))))
    return Wish(scene, tuple(name for name in ATTRIBUTES if name in mentioned))


def sample_document(random: Random, wish: Wish, label: int, *, held_out: bool) -> Scene:
    """A scene that matches exactly `label` of what was asked.

    Raises LookupError when the wanted side of the split seems to have none.
    """
    for _ in range(TRIES):
        matching = set(random.sample(wish.asked, label))
        scene = Scene(*(_value(random, wish, name, matching) for name in ATTRIBUTES))
        if is_held_out(scene) == held_out:
            return scene
    raise LookupError(f"no scene matches {label} attributes of {wish}")


def _value(random: Random, wish: Wish, attribute: str, matching: set[str]) -> str:
    if attribute in matching:
        return wish.scene[attribute]
    values = WORDS[attribute]
    wrong = wish.scene[attribute] if attribute in wish.asked else None
    return random.choice([value for value in values if value != wrong])


# The world in words: query paraphrases and document sentences, with every attribute word marked. A phrase knows where
# its attribute words are, so that training can ask at each of them.


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
