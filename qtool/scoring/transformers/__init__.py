"""Checkpoints in transformers, with prefix sharing."""
