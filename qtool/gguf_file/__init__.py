"""GGUF files on disk: read distrustfully, laid out before the first byte is written.

Rule: this room knows the container and nothing of models.
"""
