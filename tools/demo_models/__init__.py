"""How the demo models were trained: a small world, what was shown of it, and how."""
