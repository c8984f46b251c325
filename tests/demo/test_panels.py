from __future__ import annotations

import json
from typing import Any

import pytest

from qtool.inputs.panels import load_panel
from tests.tools.demo_models.reading import attributes_of
from tools.demo_models.evaluate import random_baseline
from tools.demo_models.panels import CALIBRATION, PAIRS, PANELS, PanelPlan, panel_text
from tools.demo_models.world import ATTRIBUTES, Scene, is_held_out

PATHS = {plan.name: CALIBRATION / "panels" / f"{plan.name}.jsonl" for plan in PANELS}
PATHS[PAIRS.name] = CALIBRATION / f"{PAIRS.name}.jsonl"
plans = pytest.mark.parametrize("plan", [*PANELS, PAIRS], ids=lambda plan: plan.name)
panels = pytest.mark.parametrize("plan", PANELS, ids=lambda plan: plan.name)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in PATHS[name].read_text(encoding="utf-8").splitlines()]


@plans
def test_the_header_is_true_and_says_what_was_planned(plan: PanelPlan) -> None:
    panel = load_panel(PATHS[plan.name])  # which checks hash, modality and labels
    assert (panel.name, panel.license, panel.labels) == (plan.name, "CC0-1.0", "graded")
    assert panel.modality == plan.modality


@panels
def test_a_panel_is_large_graded_and_not_easy_by_chance(plan: PanelPlan) -> None:
    panel = load_panel(PATHS[plan.name])
    assert len(panel.queries) >= 100
    assert all(len(query.documents) >= 8 for query in panel.queries)
    grades = [query.labels or () for query in panel.queries]
    assert all(max(labels) >= 3 and labels.count(max(labels)) == 1 for labels in grades)
    assert random_baseline(panel, rounds=5) < 0.55
    assert PATHS[plan.name].stat().st_size < 1_500_000


@plans
def test_ids_are_unique(plan: PanelPlan) -> None:
    entries = lines(plan.name)[1:]
    ids = [entry["id"] for entry in entries] + [doc["id"] for entry in entries for doc in entry["documents"]]
    assert len(ids) == len(set(ids))


@plans
def test_what_the_texts_say_is_on_the_right_side_and_labelled_right(plan: PanelPlan) -> None:
    checked = 0
    for entry in lines(plan.name)[1:]:
        wish = attributes_of(entry["query"]["text"])
        for document in entry["documents"]:
            said = attributes_of(document.get("text", ""))
            if len(said) == len(ATTRIBUTES):
                checked += 1
                assert is_held_out(Scene(**said)) == plan.held_out
                assert document["label"] == sum(said[name] == value for name, value in wish.items())
    assert checked > 10 or plan.modality == "image"


def test_calibration_shares_no_document_with_a_panel() -> None:
    def contents(name: str) -> set[tuple[str, str]]:
        entries = lines(name)[1:]
        return {(doc.get("text", ""), doc.get("image", "")) for entry in entries for doc in entry["documents"]}

    calibration = contents(PAIRS.name)
    assert len(calibration) == 256
    assert not any(calibration & contents(plan.name) for plan in PANELS)


def test_mixed_documents_have_all_three_forms() -> None:
    documents = [doc for entry in lines("demo-mixed")[1:] for doc in entry["documents"]]
    forms = {("text" in doc, "image" in doc) for doc in documents}
    assert forms == {(True, False), (False, True), (True, True)}


def test_the_shipped_text_panel_is_what_the_writer_writes() -> None:
    assert panel_text(PANELS[0]) == PATHS["demo-text"].read_text(encoding="utf-8")


def test_the_mixed_panel_differs_from_the_writers_at_most_in_how_a_png_is_packed() -> None:
    written = [json.loads(line) for line in panel_text(PANELS[2]).splitlines()][1:]
    for ours, shipped in zip(written, lines("demo-mixed")[1:], strict=True):
        assert ours["query"] == shipped["query"]
        for one, other in zip(ours["documents"], shipped["documents"], strict=True):
            assert {**one, "image": None} == {**other, "image": None}
