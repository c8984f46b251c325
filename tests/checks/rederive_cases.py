"""Artefacts that are within what their format allows, and not what quantizing the reference gives."""

from __future__ import annotations

import numpy as np

from tests.checks import surgery
from tests.checks.registry import REDERIVE, case
from tests.checks.weight_cases import DOWN, NVFP4, alter


@case(REDERIVE, "tensors-not-rederived", NVFP4)
def sign_of_a_zero(folder):
    """A zero has become a negative zero: no value is wrong, but it is not what was published"""

    def change(data):
        flat = data.reshape(-1)
        flat[np.flatnonzero(flat & 15 == 0)[0]] |= 8
        return data

    alter(folder, f"{DOWN}.weight", change)


@case(REDERIVE, "tensors-not-rederived", NVFP4)
def another_recipe(folder):
    """qtool.json names another recipe than the one that it was made by"""

    def change(manifest):
        text = manifest["recipe"]["text"].replace('  - "*.mlp.down_proj"\n', "")
        manifest["recipe"]["text"] = text.replace('["lm_head"]', '["lm_head", "*.mlp.down_proj"]')

    surgery.edit(folder / "qtool.json", change)
