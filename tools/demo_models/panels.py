"""Write the demo panels and calibration pairs: `python -m tools.demo_models.panels [-o FOLDER]`.

Panels contain held-out scenes only; the same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from qtool import resources
from qtool.inputs.panels import panel_header
from tools.demo_models.pictures import data_url, render
from tools.demo_models.world import (
    ATTRIBUTES,
    Scene,
    Wish,
    document_sentence,
    query_sentence,
    sample_document,
    sample_wish,
)

CALIBRATION = resources.path("calibration")
LICENSE = "CC0-1.0"


@dataclass(frozen=True)
class PanelPlan:
    """What a panel holds. `forms` are the document forms, dealt out evenly."""

    name: str
    modality: str
    seed: int
    queries: int
    documents: int
    forms: tuple[str, ...]
    held_out: bool = True


PANELS = (
    PanelPlan("demo-text", "text", 101, 120, 14, ("text",)),
    PanelPlan("demo-image", "image", 102, 120, 14, ("picture",)),
    PanelPlan("demo-mixed", "mixed", 103, 120, 14, ("text", "picture", "both")),
)
# Training scenes: calibration may see what training saw, and must not see a panel's scenes.
PAIRS = PanelPlan("demo-calibration", "mixed", 104, 128, 2, ("text", "picture", "both"), held_out=False)


def panel_text(plan: PanelPlan) -> str:
    """The whole file: a header line with the hash of the rest, then one line a query."""
    random = Random(plan.seed)
    body = "".join(_line(_entry(random, plan, number)) for number in range(plan.queries))
    about = {"license": LICENSE, "modality": plan.modality, "labels": "graded", "instruction": None}
    return panel_header(body.encode(), name=plan.name, **about).decode() + body


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _entry(random: Random, plan: PanelPlan, number: int) -> dict[str, Any]:
    wish, scenes = _graded_scenes(random, plan)
    forms = [plan.forms[index % len(plan.forms)] for index in range(plan.documents)]
    random.shuffle(forms)
    name = f"q{number:03d}"
    return {
        "id": name,
        "query": {"text": query_sentence(random, wish).text},
        "documents": [
            {"id": f"{name}-d{index:02d}", **_content(random, scene, form), "label": wish.label(scene)}
            for index, (scene, form) in enumerate(zip(scenes, forms, strict=True))
        ],
    }


def _graded_scenes(random: Random, plan: PanelPlan) -> tuple[Wish, list[Scene]]:
    """A wish and its documents in random order; a wish that has too few held-out neighbours is dropped."""
    while True:
        wish = sample_wish(random, held_out=plan.held_out)
        try:
            labels = _labels(random, len(wish.asked), plan.documents)
            return wish, [sample_document(random, wish, label, held_out=plan.held_out) for label in labels]
        except LookupError:
            continue


def _labels(random: Random, best: int, documents: int) -> list[int]:
    """One full match, one near miss, then mostly poor ones: a random order then earns a low nDCG."""
    if documents == 2:  # a pair for calibration
        return [best, random.randrange(best)]
    grades = range(best)
    drawn = random.choices(grades, [2.0**-grade for grade in grades], k=documents - 2)
    labels = [best, best - 1, *drawn]
    random.shuffle(labels)
    return labels


def _content(random: Random, scene: Scene, form: str) -> dict[str, str]:
    if form == "text":
        return {"text": document_sentence(random, scene).text}
    picture = {"image": data_url(render(random, scene))}
    if form == "picture":
        return picture
    stated = random.sample(ATTRIBUTES, 2)
    ordered = [name for name in ATTRIBUTES if name in stated]
    return {"text": document_sentence(random, scene, ordered).text, **picture}


def write_panels(folder: Path) -> None:
    """Write the panels under `folder`/panels and the calibration pairs beside them."""
    (folder / "panels").mkdir(parents=True, exist_ok=True)
    for plan in PANELS:
        (folder / "panels" / f"{plan.name}.jsonl").write_text(panel_text(plan), encoding="utf-8")
    (folder / f"{PAIRS.name}.jsonl").write_text(panel_text(PAIRS), encoding="utf-8")


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=CALIBRATION)
    write_panels(parser.parse_args().output)


if __name__ == "__main__":
    main()
