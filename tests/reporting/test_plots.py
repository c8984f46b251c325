"""Plots: every pair and every tensor, at its place, in a drawing of bounded size."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest

from qtool.checks.stage import TensorError
from qtool.reporting import plots
from qtool.reporting.plots import WIDTH, Axis
from tests.reporting import reports


def drawn(markup):
    return ET.fromstring(str(markup))  # noqa: S314 - our own


def places(drawing, kind):
    (path,) = [each for each in drawing.iter("path") if each.get("class") == f"dots {kind}"]
    return [tuple(map(int, place)) for place in re.findall(r"M(\d+) (\d+)h0", path.get("d"))]


def numbers(drawing, anchor):
    return [t.text for t in drawing.iter("text") if t.get("class") == "tick" and t.get("text-anchor") == anchor]


def test_equal_scores_lie_on_the_diagonal_and_others_beside_it():
    drawing = drawn(plots.scatter(reports.panel(scores=((-4.0, -4.0), (0.0, 0.0), (4.0, 1.0))), "log-odds"))
    (diagonal,) = [each for each in drawing.iter("line") if each.get("class") == "diagonal"]
    (x1, y1), (x2, y2) = ((float(diagonal.get(f"x{end}")), float(diagonal.get(f"y{end}"))) for end in (1, 2))
    offsets = [y - (y1 + (x - x1) * (y2 - y1) / (x2 - x1)) for x, y in places(drawing, "a")]
    assert [abs(offset) < 1 for offset in offsets] == [True, True, False]  # places are whole pixels
    assert offsets[2] > 50  # below the diagonal: the artefact says less
    assert [each.find("title").text for each in drawing.iter("circle")] == ["which ball? ⟶ a red ball"]


def test_the_histogram_counts_every_pair():
    scores = tuple((0.0, delta / 100) for delta in range(-50, 51))
    drawing = drawn(plots.histogram(reports.panel(scores=scores), "log-odds", reports.whole().noise))
    bars = [each.find("title").text for each in drawing.iter("rect") if each.get("class") == "a"]
    assert sum(int(title.rpartition(": ")[2]) for title in bars) == 101
    assert [each.find("title").text for each in drawing.iter("rect") if each.get("class") == "noise"] == [
        "noise of bfloat16, p99: 0.0300"
    ]
    assert all(number.isdigit() for number in numbers(drawing, "end"))


@pytest.mark.parametrize("scores", [((1.0, 1.0),) * 3, ((float("nan"), 1.0), (2.0, 2.0))], ids=["equal", "nan"])
def test_scores_without_extent_or_without_a_number_are_no_trouble(scores):
    panel = reports.panel(scores=scores)
    for drawing in (plots.scatter(panel, "x"), plots.histogram(panel, "x", None)):
        assert "nan" not in str(drawing)
        assert drawn(drawing).tag == "svg"


def test_what_has_no_numbers_has_no_plot():
    bare = reports.panel(scores=(), by_modality={})
    assert plots.scatter(bare, "x") is None
    assert plots.histogram(bare, "x", None) is None
    assert plots.modalities(reports.structure_only()) is None
    assert plots.layers([TensorError("lm_head.weight", "BF16", 0.0, 0.0)]) == []


def test_modalities_are_bars_from_zero_as_long_as_their_rmse():
    drawing = drawn(plots.modalities(reports.whole()))
    text, image = (float(each.get("width")) for each in drawing.iter("rect"))
    assert text / image == pytest.approx(0.03 / 0.04, abs=0.001)
    assert [each.text for each in drawing.iter("text") if each.get("class") == "name"] == [
        "balls · text",
        "balls · image",
    ]


def test_modalities_that_do_not_differ_at_all_are_bars_of_no_length():
    none = {"text": {"log_odds_rmse": 0.0, "log_odds_p95": 0.0}}
    drawing = drawn(plots.modalities(replace(reports.whole(), panels=(reports.panel(by_modality=none),))))
    assert [float(each.get("width")) for each in drawing.iter("rect")] == [0]
    (whisker, _) = [each for each in drawing.iter("line") if each.get("class") == "whisker"]
    assert whisker.get("x1") == whisker.get("x2")
    labels = [t for t in drawing.iter("text") if t.get("text-anchor") == "middle" and t.get("class") == "tick"]
    assert float(labels[0].text) == 0


def test_layers_without_an_error_lie_on_the_axis():
    ((_, markup),) = plots.layers([TensorError("model.layers.0.mlp.up_proj.weight", "BF16", 0.0, 0.0)])
    assert float(numbers(drawn(markup), "end")[0]) == 0


def test_each_stack_of_layers_is_a_plot_and_what_exceeds_its_format_stands_out():
    stacks = plots.layers([*reports.whole().weights, TensorError("visual.blocks.7.attn.qkv.weight", "BF16", 0.0, 0.0)])
    assert [name for name, _ in stacks] == ["model.layers", "visual.blocks"]
    drawing = drawn(stacks[0][1])
    # Layers 0 to 2 keep the bound of 0.11; the three tensors of layer 3 are at 0.12, at one place of the screen.
    assert [len(places(drawing, kind)) for kind in ("attention", "mlp", "other", "above")] == [3, 3, 3, 1]


def test_very_many_pairs_make_a_drawing_of_bounded_size():
    scores = tuple((n % 997 / 100, n % 991 / 100) for n in range(200_000))
    text = str(plots.scatter(reports.panel(scores=scores), "log-odds"))
    # At most one dot a pixel of the plot: 300 by 210 at 10 characters.
    assert len(text) < WIDTH * 260 * 10


def test_ticks_are_round_numbers_inside_the_range():
    for low, high in ((-5.37, 5.4), (0, 0.0137), (0, 120), (-1e-5, 2e-5), (3, 3.5)):
        ticks = Axis(low, high, 0, 1).ticks()
        assert 3 <= len(ticks) <= 8
        assert low <= ticks[0] < ticks[-1] <= high
        steps = {f"{after - before:.6g}" for before, after in pairwise(ticks)}
        assert len(steps) == 1
        assert re.fullmatch(r"0\.0*[125]|[125]0*|[125]e-\d+", steps.pop())
