"""What is left out of garbage collections."""

from __future__ import annotations

import gc

from narrows.engine.memory import settle


def test_what_there_is_is_left_alone_and_garbage_is_collected_first():
    class Held:
        collected = 0

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            Held.collected += 1

    kept = Held()
    Held()
    before = gc.get_freeze_count()
    try:
        settle()
        assert Held.collected == 1
        assert gc.get_freeze_count() > before
        del kept
        gc.collect()
        assert Held.collected == 1
    finally:
        gc.unfreeze()
    gc.collect()
    assert Held.collected == 2
