"""Scores from a model: the same pairs, the same official prompt, whatever runs the weights.

Rule: a scorer differs from the next only in where its weights come from and what multiplies them.
"""

from __future__ import annotations

import os

# torch's threads wait for each other busily unless told otherwise before torch is imported. Beside one other busy process
# that made two threads five to ten times slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
