"""Running servers.

Rule: a server is asked in the way in which it reads the official prompt, and in no other.
"""
