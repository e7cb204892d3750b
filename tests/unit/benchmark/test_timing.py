import time

import numpy as np

from sam_distill.benchmark.timing import Contender, time_in_turns
from sam_distill.runs.allocator import keep_freed_memory


def test_contenders_take_turns_and_times_are_per_unit() -> None:
    turns: list[str] = []
    slow = Contender("slow", lambda: (turns.append("slow"), time.sleep(0.02)), units=2)
    quick = Contender("quick", lambda: turns.append("quick"), ours=False)
    first, second = time_in_turns([slow, quick], "cpu", seconds=0.01)
    assert turns == ["slow", "quick"] * (first.rounds + 1)  # plus a first round, which is not counted
    assert first.rounds >= 5
    assert 0.01 <= first.low <= first.median <= first.high
    assert second.median < first.median
    assert (first.ours, second.ours) == (True, False)


def test_memory_is_measured_per_contender() -> None:
    keep_freed_memory()  # as the commands do: memory that one contender freed must not hide the use of the next

    def allocating(megabytes: int) -> Contender:
        return Contender("", lambda: [np.ones(20 << 20, np.uint8) for _ in range(megabytes // 20)])

    large, small, again = time_in_turns([allocating(400), allocating(20), allocating(400)], "cpu", seconds=0.01)
    for timing in (large, again):
        if timing.memory is not None:  # None where it can't be measured
            assert 350e6 < timing.memory < 500e6
            assert small.memory is not None
            assert small.memory < 100e6
