from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from qtool.inputs.media import MediaAccess
from qtool.inputs.panels import load_panel
from qtool.verify.collect import PanelScores
from qtool.verify.compare import compare, panel_report
from tests.inputs.site import serve


def test_a_picture_that_is_gone_when_the_report_is_drawn_costs_no_verdict(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    with serve({}) as site:
        documents = [{"image": [f"{site.url}/gone.png", "red.png"], "label": 1}, {"text": "no", "label": 0}]
        (tmp_path / "p.jsonl").write_text(json.dumps({"query": "which?", "documents": documents}))
        panel = load_panel(tmp_path / "p.jsonl", MediaAccess(local_addresses=True))
        one, other = PanelScores(np.array([1.0, 0.0])), PanelScores(np.array([2.0, 0.0]))
        report = panel_report(panel, one, other, compare(panel, one, other))
    assert site.asked == ["/gone.png"]
    assert len(report.worst[0].pictures) == 1  # the red one
    assert report.worst[0].pictures[0].startswith("data:image/png")
