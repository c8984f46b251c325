"""For the whole suite."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("qtool", deadline=None)  # the first example of many a test compiles a kernel
settings.load_profile("qtool")
