"""The recipes of the table and their peers."""

from __future__ import annotations

from qtool.calibration.group import FAST, STANDARD, Effort
from tests.bench_quality import peers
from tests.bench_quality.pipeline import Recipe, calibrated

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("max", peers.plain, needs_data=False),
        Recipe("mse", peers.mse, needs_data=False),
        Recipe("four-over-six", peers.four_over_six, needs_data=False),
        Recipe("expanded mse", peers.expanded_mse, needs_data=False),
        Recipe("GPTQ", peers.gptq, sequential=False),
        Recipe("in-loop scales", calibrated(Effort(passes=0))),
        Recipe("fast", calibrated(FAST), asymmetric=True),
        Recipe("one pass", calibrated(Effort(passes=1)), asymmetric=True),
        Recipe("standard", calibrated(STANDARD), asymmetric=True),
        Recipe("tuned 5.5", calibrated(STANDARD), asymmetric=True, budget=5.5),
        Recipe("token weights", calibrated(STANDARD), asymmetric=True, weighted=True),
        Recipe("best", calibrated(STANDARD), asymmetric=True, weighted=True, two_sided=True),
    )
}
ABOUT = {
    "max": "what everyone ships; `nvfp4-w4a16`",
    "mse": "ModelOpt's scale search; `nvfp4-w4a16-mse`",
    "four-over-six": "ModelOpt's; `nvfp4-w4a16-4over6`",
    "expanded mse": "as llm-compressor: 0.8 to 1.8 times the largest magnitude",
    "GPTQ": "as ModelOpt: scales of max, original inputs",
    "in-loop scales": "GPTQ with block scales chosen on the way, inputs of the quantized layers before",
    "fast": "and asymmetric and residual targets",
    "one pass": "and one pass of coordinate descent",
    "standard": "and eight passes",
    "tuned 5.5": "`standard` around the fused groups that `qtool tune --budget 5.5bpw` keeps: more bytes than all others",
    "token weights": "`standard` with tokens weighted by the gradient of the answer",
    "best": "and two-sided descent under the covariance of that gradient",
}
