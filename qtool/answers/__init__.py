"""Answers of scorers, written down as they come: what was answered once is not asked again.

Rule: an answer is known by what it depends on, the scorer's identity and the question's content, and by nothing else.
"""
