"""Programs for the people who work on qtool; not in the wheel."""
