"""Opens a model for measuring the sensitivity of its fused groups, within the memory that is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qtool.calibration.data import questions
from qtool.calibration.sensitivity import Sensitivity
from qtool.console import human_size
from qtool.errors import SetupError
from qtool.memory import free_memory, resident_memory
from qtool.options import parse_size
from qtool.progress import Meter, StageProgress
from qtool.scoring.transformers.activations import ActivationStore
from qtool.scoring.transformers.layerwise import Pictures
from qtool.scoring.transformers.runtime import ScorerOptions, open_scorer

if TYPE_CHECKING:
    from qtool.artefact import CheckpointArtefact
    from qtool.calibration.tune import TuneOptions
    from qtool.export.quantize import QuantizeJob
    from qtool.inputs.panels import Panel

PROMPTS: Final = 128
"""Groups differ by factors, and the mean square of 128 changes is known to an eighth."""
_SHARE: Final = 0.8


@contextmanager
def opened_sensitivity(
    opened: CheckpointArtefact,
    job: QuantizeJob,
    data: Panel,
    options: TuneOptions,
    progress: StageProgress,
    *,
    encodes: bool = True,
) -> Iterator[Sensitivity]:
    """On prompts of `data`, evenly spread; without `encodes` pictures are as tokens of text."""
    scorer = open_scorer(opened, ScorerOptions(options.task, device="cpu"))
    model = scorer.layers()
    fixed = model.footprint.fixed + 2 * model.footprint.layer  # what rounding changes in a layer, and gradients
    budget = _budget(options, fixed)
    asked = questions(data, scorer.task, scorer.query_instruction)
    chosen = [asked[number * len(asked) // PROMPTS] for number in range(PROMPTS)] if len(asked) > PROMPTS else asked
    fused = {each.source.hf_name: group for group, members in job.plan.groups.items() for each in members}
    scratch = options.output.absolute().parent if options.output else None
    with ExitStack() as stack:
        store = stack.enter_context(ActivationStore(budget - fixed, model.device, scratch))
        pictures = Pictures(model, store, budget, encodes=encodes)
        prompts = [pictures.registered(scorer.prompt(question)) for question in chosen]
        pictures.finish()
        spans = [model.span(prompt) for prompt in prompts]
        sensitivity = Sensitivity(model, scorer.answer(), spans, fused, pictures, store, lambda _: None)
        meter = Meter(sensitivity.work, lambda done, total: progress("measuring groups", done, total))
        yield replace(sensitivity, advance=meter.advance)


def _budget(options: TuneOptions, fixed: int) -> int:
    free = free_memory()
    if options.memory != "auto":
        budget = parse_size(options.memory)
    else:
        budget = resident_memory() + int(_SHARE * free) if free is not None else 2 * fixed
    if budget < fixed:
        raise SetupError(
            f"Tuning the model needs {human_size(fixed)} of memory; {human_size(budget)} may be used.",
            "Pass a larger --memory, or close other programs.",
        )
    return budget
