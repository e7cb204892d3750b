"""Memory that a training step frees is kept for the next step."""

import os
import platform
import subprocess
import sys

import pytest

COUNT_PAGES = """
import resource
import numpy as np
from sam_distill.runs.allocator import keep_freed_memory

keep_freed_memory()
np.ones(5_000_000, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(5_000_000, np.float32)  # 20 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(**environment: str) -> int:
    neutral = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_PAGES], env=neutral | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept_unless_the_user_says_otherwise() -> None:
    with_user_setting = page_faults(MALLOC_MMAP_THRESHOLD_="1000000")  # as a user may set it
    assert page_faults() < with_user_setting / 10
