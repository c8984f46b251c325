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
from qtool.reporting.words import metric_rows
from tests.reporting import reports


def drawn(markup):
    return ET.fromstring(str(markup))  # noqa: S314 - our own


def places(drawing, kind):
    (path,) = [each for each in drawing.iter("path") if each.get("class") == f"dots {kind}"]
    return [tuple(map(int, place)) for place in re.findall(r"M(\d+) (\d+)h0", path.get("d"))]


def numbers(drawing, anchor):
    return [t.text for t in drawing.iter("text") if t.get("class") == "tick" and t.get("text-anchor") == anchor]


def test_pairs_lie_as_far_from_the_zero_line_as_their_scores_differ():
    worst = replace(reports.PAIR, reference=4.0, artefact=1.0, delta=-3.0)
    panel = reports.panel(scores=((-4.0, -4.0), (0.0, 0.0), (4.0, 1.0)), worst=(worst,))
    drawing = drawn(plots.differences(panel, "log-odds", None))
    (zero,) = [each for each in drawing.iter("line") if each.get("class") == "zero"]
    offsets = [y - float(zero.get("y1")) for _, y in places(drawing, "a")]
    assert [abs(offset) < 1 for offset in offsets] == [True, True, False]  # places are whole pixels
    assert offsets[2] > 50  # below the line: the artefact says less
    assert [each.find("title").text for each in drawing.iter("circle")] == ["which ball? ⟶ a red ball"]


def test_each_gate_shows_value_interval_and_bound_in_their_order():
    rows = metric_rows(reports.whole(), reports.panel())
    drawing = drawn(plots.gates(rows, "balls"))
    above, below = [float(each.get("cx")) for each in drawing.iter("circle")]
    limits = [float(each.get("x1")) for each in drawing.iter("line") if each.get("class") == "limit"]
    spans = [each for each in drawing.iter("line") if each.get("class") == "span"]
    assert (
        limits[0] < float(spans[0].get("x1")) < above < float(spans[0].get("x2"))
    )  # 0.0353 in [0.0312, 0.0399], at most 0.03
    assert limits[1] < below  # 0.986, at least 0.9
    assert [each.get("class") for each in drawing.iter("circle")] == ["value fail", "value pass"]
    assert [each.text for each in drawing.iter("text") if each.get("class") == "name"] == [
        "log_odds_rmse",
        "kendall_tau",
    ]
    assert plots.gates([replace(row, value=None) for row in rows], "balls") is None


def test_the_histogram_counts_every_pair():
    scores = tuple((0.0, delta / 100) for delta in range(-50, 51))
    drawing = drawn(plots.histogram(reports.panel(scores=scores), "log-odds", reports.whole().noise))
    bars = [each.find("title").text for each in drawing.iter("rect") if each.get("class") == "a"]
    assert sum(int(title.rpartition(": ")[2]) for title in bars) == 101
    assert [each.find("title").text for each in drawing.iter("rect") if each.get("class") == "noise"] == [
        "noise of bfloat16, p99: 0.0300"
    ]
    assert all(number.isdigit() for number in numbers(drawing, "end"))


@pytest.mark.parametrize("scores", [((1.0, 2.0),) * 3, ((float("nan"), 1.0), (2.0, 2.5))], ids=["equal", "nan"])
def test_scores_without_extent_or_without_a_number_are_no_trouble(scores):
    panel = reports.panel(scores=scores)
    for drawing in (plots.differences(panel, "x", None), plots.histogram(panel, "x", None)):
        assert "nan" not in str(drawing)
        assert drawn(drawing).tag == "svg"


def test_what_has_no_numbers_has_no_plot():
    for scores in ((), ((1.0, 1.0), (2.0, 2.0)), ((float("nan"), 1.0),)):
        bare = reports.panel(scores=scores, by_modality={})
        assert plots.differences(bare, "x", reports.noise("bfloat16")) is None
        assert plots.histogram(bare, "x", reports.noise("bfloat16")) is None
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


def test_modalities_that_do_not_differ_or_are_only_one_have_no_plot():
    none = {kind: {"log_odds_rmse": 0.0, "log_odds_p95": 0.0} for kind in ("text", "image")}
    one = {"text": {"log_odds_rmse": 0.1, "log_odds_p95": 0.2}}
    for kinds in (none, one):
        assert plots.modalities(replace(reports.whole(), panels=(reports.panel(by_modality=kinds),))) is None


def test_layers_without_an_error_have_no_plot():
    assert plots.layers([TensorError("model.layers.0.mlp.up_proj.weight", "BF16", 0.0, 0.0)]) == []


def test_each_stack_of_layers_is_a_plot_and_what_exceeds_its_format_stands_out():
    stacks = plots.layers([*reports.whole().weights, TensorError("visual.blocks.7.attn.qkv.weight", "F16", 1e-4, 5e-4)])
    assert [name for name, _ in stacks] == ["model.layers", "visual.blocks"]
    drawing = drawn(stacks[0][1])
    # Layers 0 to 2 keep the bound of 0.11; the three tensors of layer 3 are at 0.12, at one place of the screen.
    assert [len(places(drawing, kind)) for kind in ("attention", "mlp", "other", "above")] == [3, 3, 3, 1]


def test_very_many_pairs_make_a_drawing_of_bounded_size():
    scores = tuple((n % 997 / 100, n % 991 / 100) for n in range(200_000))
    text = str(plots.differences(reports.panel(scores=scores), "log-odds", None))
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
