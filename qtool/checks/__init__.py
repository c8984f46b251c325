"""What can be said of an artefact without a score: by itself, and beside its reference."""
