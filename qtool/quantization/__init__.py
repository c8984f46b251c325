"""`qtool quantize`: from a checkpoint to a smaller one.

Rule: a pure plan decides everything first; two backends carry the same plan out and write the same bytes.
"""
