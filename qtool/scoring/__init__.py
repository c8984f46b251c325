"""Scores from a model: the same pairs, the same official prompt, whatever runs the weights.

Rule: a scorer differs from the next only in where its weights come from and what multiplies them.
"""
