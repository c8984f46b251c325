"""Scores from a model: the same pairs with the same official prompt, whichever runtime computes them."""

from __future__ import annotations

import os

# By default torch's threads spin while they wait for each other; beside one other busy process, two threads were then
# five to ten times slower than one. The variable must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
