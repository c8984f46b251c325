"""From two models' scores to a verdict."""
