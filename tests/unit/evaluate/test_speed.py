import time

import numpy as np

from sam_distill.evaluate.speed import Contender, race


def test_all_take_turns_and_count_their_units() -> None:
    turns: list[str] = []
    slow = Contender("slow", lambda: (turns.append("slow"), time.sleep(0.02)), units=2)
    quick = Contender("quick", lambda: turns.append("quick"), ours=False)
    first, second = race([slow, quick], "cpu", seconds=0.01)
    assert turns == ["slow", "quick"] * (first.rounds + 1)  # one turn each before the clock runs
    assert first.rounds >= 5
    assert 0.01 <= first.low <= first.median <= first.high
    assert second.median < first.median
    assert (first.ours, second.ours) == (True, False)


def test_memory_is_that_of_each() -> None:
    def use(megabytes: int) -> Contender:
        return Contender("", lambda: np.ones(megabytes << 20, np.uint8).sum())

    small, large = race([use(4), use(400)], "cpu", seconds=0.01)
    if large.memory is not None:  # where the system tells
        assert 350e6 < large.memory < 500e6
        assert small.memory is not None
        assert small.memory < 100e6
