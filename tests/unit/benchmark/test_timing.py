import time

import numpy as np

from sam_distill.benchmark.timing import Contender, time_in_turns
from sam_distill.runs.allocator import keep_freed_memory


def test_all_take_turns_and_count_their_units() -> None:
    turns: list[str] = []
    slow = Contender("slow", lambda: (turns.append("slow"), time.sleep(0.02)), units=2)
    quick = Contender("quick", lambda: turns.append("quick"), ours=False)
    first, second = time_in_turns([slow, quick], "cpu", seconds=0.01)
    assert turns == ["slow", "quick"] * (first.rounds + 1)  # one turn each before the clock runs
    assert first.rounds >= 5
    assert 0.01 <= first.low <= first.median <= first.high
    assert second.median < first.median
    assert (first.ours, second.ours) == (True, False)


def test_memory_is_that_of_each() -> None:
    keep_freed_memory()  # as the commands do: what one has freed, the next must not use again unseen

    def use(megabytes: int) -> Contender:
        return Contender("", lambda: [np.ones(20 << 20, np.uint8) for _ in range(megabytes // 20)])

    large, small, again = time_in_turns([use(400), use(20), use(400)], "cpu", seconds=0.01)
    for timing in (large, again):
        if timing.memory is not None:  # where the system tells
            assert 350e6 < timing.memory < 500e6
            assert small.memory is not None
            assert small.memory < 100e6
