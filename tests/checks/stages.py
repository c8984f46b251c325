"""The stages of a verification on paths: what they compare is opened for each of them anew."""

from __future__ import annotations

from qtool.artefact import open_artefact
from qtool.checks import prompts, structure, weights
from qtool.checks import rederive as again
from qtool.checks.reference import reference_in


def check_structure(artefact, reference, task=None, mmproj=None):
    return structure.check_structure(opened(artefact, task, mmproj), reference_in(reference, task))


def compare_weights(artefact, reference, task=None, mmproj=None):
    return weights.compare_weights(opened(artefact, task, mmproj), reference_in(reference, task))


def rederive(artefact, reference, folder, task=None, mmproj=None):
    return again.rederive(opened(artefact, task, mmproj), reference_in(reference, task), folder)


def compare_prompts(reference, artefact, questions, folder, target):
    return prompts.compare_prompts(reference, artefact, questions, reference_in(folder), target)


def opened(artefact, task=None, mmproj=None):
    return open_artefact(str(artefact), task=task, mmproj=mmproj)
