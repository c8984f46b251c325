"""Artefacts: NVFP4 checkpoints and GGUF files, planned from headers and written by one writer of tensors."""
