"""Reads a sentence of the world back into its attributes: the inverse of tools.demo_models.world."""

from __future__ import annotations

import re

from tools.demo_models.world import PLACE_TEMPLATES, WORDS, plural_of


def attributes_of(text: str) -> dict[str, str]:
    text = text.lower().replace("one sees", "sees").replace("i want", "")
    found = {}
    for attribute, values in WORDS.items():
        for value, words in values.items():
            forms = {form for word in words for form in _forms(attribute, word)}
            if any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text) for form in forms):
                assert attribute not in found, (text, attribute)
                found[attribute] = value
    return found


def _forms(attribute: str, word: str) -> set[str]:
    if attribute == "position":
        return {PLACE_TEMPLATES[word]}
    return {word, plural_of(word)} if attribute == "shape" else {word}
