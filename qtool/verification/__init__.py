"""Proof that an artefact scores as its reference does.

Rule: numbers are computed here and judged by the recipe's gates; nothing here knows how a score came about.
"""
