"""What a checkpoint on disk holds, in the terms of its architecture.

Rule: only headers and config.json are read here.
"""
