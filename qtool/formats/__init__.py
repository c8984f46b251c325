"""Number formats on plain arrays: no tensor names, no disk, no models.

Rule: a format is defined here once, bit for bit, and everything else calls it.
"""
