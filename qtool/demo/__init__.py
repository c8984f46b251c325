"""The demo models: a small world, what was trained on it, and how.

The shipped models are real Qwen3-VL checkpoints; only their world is a toy.
"""
