"""A small world of graded attributes: scenes, what they are called, how well one meets a wish.

Rule: everything follows from a seed, and a scene is either for training or held out.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import cache
from random import Random

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
