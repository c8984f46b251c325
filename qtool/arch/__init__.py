"""What the tensors of each model family mean: names, shapes, roles, heads and prompts, as data.

Rule: everything is declared here from config fields; nothing opens a tensor, and nothing is guessed from a name on disk.
"""
