"""From two models' answers to a verdict."""
