"""Scores from running servers, each asked in the one way in which it reads the official prompt."""
