from __future__ import annotations

from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.tools.demo_models.reading import attributes_of
from tools.demo_models.lessons import Teacher
from tools.demo_models.pictures import SIDE, data_url, render
from tools.demo_models.world import (
    ATTRIBUTES,
    WORDS,
    Scene,
    Wish,
    all_scenes,
    document_sentence,
    is_held_out,
    query_sentence,
    sample_document,
    sample_wish,
    scenes,
)

SCENE = Scene("two", "small", "red", "star", "left")


def test_every_scene_is_on_exactly_one_side() -> None:
    held_out, training = set(scenes(held_out=True)), set(scenes(held_out=False))
    assert held_out | training == set(all_scenes())
    assert not held_out & training
    assert 0.2 < len(held_out) / len(all_scenes()) < 0.3


def test_the_split_never_moves() -> None:
    assert len(scenes(held_out=True)) == 484
    assert not is_held_out(SCENE)


def test_a_label_counts_the_matches_asked_for() -> None:
    wish = Wish(SCENE, ("count", "colour", "position"))
    other = Scene("two", "large", "blue", "star", "left")
    assert wish.matches(other) == {"count": True, "colour": False, "position": True}
    assert wish.label(other) == 2
    assert wish.fraction(other) == pytest.approx(2 / 3)


@pytest.mark.parametrize("held_out", [True, False])
def test_documents_have_the_wanted_label_and_side(*, held_out: bool) -> None:
    random = Random(5)
    for _ in range(100):
        wish = sample_wish(random, held_out=held_out)
        label = random.randint(0, len(wish.asked))
        try:
            document = sample_document(random, wish, label, held_out=held_out)
        except LookupError:
            continue
        assert wish.label(document) == label
        assert is_held_out(document) == is_held_out(wish.scene) == held_out


def test_no_wanted_document_is_an_error() -> None:
    kept = scenes(held_out=True)[0]
    with pytest.raises(LookupError, match="no scene matches 5"):
        sample_document(Random(0), Wish(kept, ATTRIBUTES), 5, held_out=False)


def test_sentences_say_what_the_scene_is_and_mark_it() -> None:
    random = Random(3)
    for scene in random.choices(all_scenes(), k=300):
        sentence = document_sentence(random, scene)
        assert attributes_of(sentence.text) == {name: scene[name] for name in ATTRIBUTES}
        for name, (start, end) in sentence.spans.items():
            assert attributes_of(sentence.text[start:end]) == {name: scene[name]}


def test_queries_say_only_what_was_asked() -> None:
    random = Random(4)
    for _ in range(300):
        wish = sample_wish(random, held_out=False)
        query = query_sentence(random, wish)
        assert attributes_of(query.text) == {name: wish.scene[name] for name in wish.asked}
        assert set(query.spans) == set(wish.asked)


def test_queries_have_many_phrasings() -> None:
    wish = Wish(SCENE, ATTRIBUTES)
    assert len({query_sentence(Random(seed), wish).text for seed in range(200)}) > 100


def test_words_belong_to_one_value() -> None:
    words = [word for values in WORDS.values() for group in values.values() for word in group]
    assert len(words) == len(set(words))


def test_pictures_follow_from_the_seed() -> None:
    first, again, other = (render(Random(seed), SCENE) for seed in (1, 1, 2))
    assert first.size == (SIDE, SIDE)
    assert first.mode == "P"
    assert data_url(first) == data_url(again) != data_url(other)
    assert len(data_url(first)) < 1500


@pytest.mark.parametrize(("position", "axis", "low"), [("left", 1, True), ("right", 1, False), ("top", 0, True)])
def test_shapes_are_drawn_where_the_scene_says(*, position: str, axis: int, low: bool) -> None:
    for seed in range(10):
        pixels = np.asarray(render(Random(seed), Scene("two", "large", "red", "square", position)).convert("RGB"))
        red = np.argwhere((pixels[..., 0] > 180) & (pixels[..., 1] < 90))
        assert len(red) > 500
        assert (red[:, axis].mean() < 45) == low


def test_lessons_never_show_a_held_out_scene(tokenizer: Tokenizer) -> None:
    teacher = Teacher(tokenizer, 9, (0.2, 0.6, 0.2))
    for lesson in [teacher.rerank_lesson(6) for _ in range(20)] + [teacher.embed_lesson(6) for _ in range(20)]:
        assert not any(map(is_held_out, [lesson.wish.scene, *lesson.scenes]))


def test_lessons_follow_from_the_seed(tokenizer: Tokenizer) -> None:
    first, again = (Teacher(tokenizer, 9, (0.3, 0.3, 0.4)).rerank_lesson(4) for _ in range(2))
    assert [part.ids for part in first.documents] == [part.ids for part in again.documents]
    assert first.query.ids == again.query.ids
