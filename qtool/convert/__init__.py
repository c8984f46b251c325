"""Checkpoints to GGUF: rank head, official prompt, vision projector.

Rule: what llama.cpp's own converter writes right is written byte for byte the same.
"""
