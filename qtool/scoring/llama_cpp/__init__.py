"""GGUF files in llama.cpp, in this process.

Rule: what is not llama.cpp's own computation happens here in the open: the official prompt, the pictures' grid, the head.
"""
