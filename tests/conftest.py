"""What every test may use. Being here, it also puts ``tests`` on the path: ``import oracles``."""

from __future__ import annotations

from hypothesis import settings

# A shared machine may be slow at any moment; no test of ours is about wall-clock time.
settings.register_profile("narrows", deadline=None)
settings.load_profile("narrows")
