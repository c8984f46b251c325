"""The page: well-formed, self-contained, safe, and whole."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from qtool.reporting.html import render_html
from tests.reporting import reports

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page read strictly: every element closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.mark.parametrize("name", reports.ALL)
def test_the_page_is_well_formed_and_loads_nothing(name):
    text = render_html(reports.ALL[name]())
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    for tag, attribute, value in page.attributes:
        assert not attribute.startswith("on"), (tag, attribute)
        if attribute in ("src", "href", "srcset", "action", "data"):
            assert re.match(r"#[a-z]+$|data:image/(png|jpeg);base64,", value), (tag, attribute, value)
    assert not re.search(r"url\(|@import", text.partition("</style>")[0])
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes


@pytest.mark.parametrize("name", reports.ALL)
def test_headings_are_in_order_and_drawings_have_names(name):
    page = Page(render_html(reports.ALL[name]()))
    assert page.headings[0] == 1
    assert all(below <= above + 1 for above, below in zip(page.headings, page.headings[1:], strict=False))
    assert page.headings.count(1) == 1
    named = len(re.findall(r'role="img"><title>', render_html(reports.ALL[name]())))
    assert named == page.attributes.count(("svg", "role", "img"))


def test_the_verdict_stands_first_then_why_then_the_rest():
    page = Page(render_html(reports.whole()))
    order = ["Fail model-NVFP4", "Weights failed; 1 of 2 gates failed on 3 pairs, 1 skipped.", "Why", "one is wrong",
             "0.0353 is above 0.03", "Stages", "Metrics and gates", "Worst pairs", "Rederived files", "Provenance"]  # fmt: skip
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)


def test_every_part_of_the_report_is_on_the_page():
    text = Page(render_html(reports.whole())).text
    for words in ("[0.0312, 0.0399]", "root mean square of Δ", "-1.5e-05", "which ball?", "a red ball", "Δ -0.2500", "label 2", "CC0-1.0", "a" * 64,
                  "c" * 64, "torch 2.13.0", "Noise floor: the reference in bfloat16", "the server shows no token ids",
                  "qtool x", "model.layers.3.mlp.up_proj.weight", "b.safetensors", "org/model", "schema 3"):  # fmt: skip
        assert words in text, words
    assert "gone" not in text


def test_what_a_stranger_wrote_is_text_and_his_pictures_are_pictures_or_nothing():
    text = render_html(reports.hostile())
    page = Page(text)
    assert "<script>alert(1)</script>" in page.text
    assert "{{7*7}}" in page.text
    sources = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert sources == [reports.thumbnail_of_red()]


def test_tables_can_be_stacked_on_a_phone_since_each_cell_knows_its_column():
    page = Page(render_html(reports.whole()))
    tables = [value for tag, name, value in page.attributes if (tag, name) == ("table", "class")]
    assert len(tables) == page.tags.count("table")
    assert all("stack" in value.split() for value in tables)
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("td", "data-label")]
    assert len(labels) == page.tags.count("td")


def test_no_plot_is_empty():
    same = reports.panel(scores=((0.5, 0.5), (0.5, 0.5)), by_modality={"text": {"log_odds_rmse": 0.0}}, worst=())
    text = render_html(replace(reports.whole(), panels=(same,), gates=(), weights=(), noise=None))
    assert 'role="img"' not in text
    assert "All 2 scores are equal" in text


def test_outcomes_differ_by_word_and_by_shape():
    text = render_html(reports.whole())
    shapes = {}
    for outcome in ("pass", "fail", "inconclusive", "skipped", "ungated"):
        (shapes[outcome],) = re.findall(rf'<symbol id="{outcome}"[^>]*>(.*?)</symbol>', text)
    assert len(set(shapes.values())) == 5
    assert set(re.findall(r'href="#(\w+)"', text)) <= set(shapes)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_of_text_keep_the_contrast_that_wcag_aa_asks_for(scheme):
    block = re.findall(r":root \{(.*?)\}", render_html(reports.empty()), re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", block))
    colours = {name: f"#{c[1] * 2}{c[2] * 2}{c[3] * 2}" if len(c) == 4 else c for name, c in colours.items()}
    pairs = [(ink, ground) for ink in ("ink", "quiet", "a") for ground in ("page", "card")]
    outcomes = ("pass", "fail", "inconclusive", "neutral")
    pairs += [pair for one in outcomes for pair in ((one, "page"), (one, f"{one}-tint"), ("quiet", f"{one}-tint"))]
    for ink, ground in pairs:
        dark, light = sorted((luminance(colours[ink]), luminance(colours[ground])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)
