"""Shared documents are found by content: another name, size, encoding or spacing hides nothing."""

from __future__ import annotations

import base64
import json
from io import BytesIO

import pytest
from PIL import Image

from qtool.inputs.builtin import load_panels
from qtool.inputs.overlap import PanelContents, content_keys, normalized, shared_keys
from qtool.inputs.panels import load_panel
from qtool.inputs.pictures import load_image

LONG = (
    "Rain dissolves small amounts of minerals from rock, and rivers carry them to the sea. Water leaves the sea again by "
    "evaporation, but the salts stay behind. Over hundreds of millions of years they have reached thirty-five grams."
)


@pytest.fixture
def panel_of(tmp_path):
    def write(*documents):
        path = tmp_path / f"panel{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text(json.dumps({"query": "q", "documents": list(documents)}))
        return load_panel(path)

    return write


@pytest.fixture(scope="module")
def pictures():
    """A page, a chart and two scenes of the demo world."""
    pages = load_panels(["retrieval-image"])[0].queries
    scenes = load_panels(["demo-image"])[0].queries[0].documents
    charts = [d for q in pages for d in q.documents if d.id.startswith("en-rain")]
    sources = [pages[0].documents[0].image[0], charts[0].image[0], scenes[0].image[0], scenes[1].image[0]]
    return [load_image(source) for source in sources]


def url(picture, kind="PNG", **options):
    file = BytesIO()
    picture.save(file, kind, **options)
    return f"data:;base64,{base64.b64encode(file.getvalue()).decode()}"


def shared(panel_of, mine, theirs):
    return PanelContents(panel_of(theirs)).shared(panel_of(mine))


def test_texts_are_compared_without_case_spaces_punctuation_and_form():
    assert normalized("Two red  BOXES,\non the left.") == normalized("two red boxes on the left")
    assert normalized("Ａﬁ") == normalized("AFI")
    assert normalized("Straße") == normalized("STRASSE")


@pytest.mark.parametrize(
    "other",
    [
        LONG.upper(),
        f"Heading\n{LONG}",
        LONG[: len(LONG) * 9 // 10],
        LONG.replace(" ", "\n"),
        LONG.replace("thirty-five grams", "forty grams"),
    ],
)
def test_a_long_text_is_found_whole_in_part_and_edited(panel_of, other):
    assert shared(panel_of, other, LONG) == 1


def test_another_long_text_is_not(panel_of):
    other = (
        "Rain falls on the sea as well. "
        + "The tide has another cause: the moon draws the water beneath it, and so on. " * 3
    )
    assert shared(panel_of, other, LONG) == 0


def test_a_short_text_is_found_where_it_is_the_same(panel_of):
    assert shared(panel_of, "Two red boxes on the left.", "two  red boxes on the left") == 1
    assert shared(panel_of, "Two red boxes on the left.", "two red boxes on the right") == 0


def test_a_picture_is_found_in_another_encoding_and_size(panel_of, pictures):
    for picture in pictures:
        for copy in (
            url(picture, "JPEG", quality=85),
            url(picture.resize((picture.width * 3 // 2, picture.height * 3 // 2))),
            url(picture.quantize(64).convert("RGB")),
        ):
            assert shared(panel_of, {"image": copy}, {"image": url(picture)}) == 1


def test_no_other_picture_is(panel_of, pictures):
    for picture in pictures:
        others = [{"image": url(other)} for other in pictures if other is not picture]
        assert PanelContents(panel_of(*others)).shared(panel_of({"image": url(picture)})) == 0


def test_a_small_thing_in_another_colour_is_another_picture(panel_of):
    scenes = [Image.new("RGB", (96, 96), "#abababff"[:7]) for _ in range(2)]
    for scene, colour in zip(scenes, ("#c83232", "#3264c8"), strict=True):
        scene.paste(colour, (20, 20, 32, 32))
    assert shared(panel_of, {"image": url(scenes[0])}, {"image": url(scenes[1])}) == 0


def test_a_short_text_beside_a_picture_says_nothing(panel_of, pictures):
    page, chart, *_ = map(url, pictures)
    assert shared(panel_of, {"text": "a page", "image": page}, {"text": "a page", "image": chart}) == 0
    assert shared(panel_of, {"text": "a page", "image": page}, {"text": "a chart", "image": page}) == 1


def test_keys_find_the_same_documents_again(panel_of, pictures):
    page, chart, *_ = map(url, pictures)
    data = panel_of(LONG, "short", {"text": "a page", "image": page}, "short")
    keys = content_keys(data)
    assert len(base64.b64decode(keys)) == 3 * 6
    assert shared_keys(keys, panel_of(LONG.upper(), "other", {"text": "another", "image": page}, {"image": chart})) == 2
    assert shared_keys(keys, data) == 4
    with pytest.raises(ValueError, match="base64"):
        shared_keys("no keys!", data)
