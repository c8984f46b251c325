"""Hugging Face checkpoints on disk: where they come from, how they are read, how they are written.

Rule: nothing here knows what a tensor means, and no file is trusted before its header is checked.
"""
