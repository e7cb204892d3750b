"""How often OpenMP threads spin before they sleep, in a process of a command, as GNU's OpenMP library reports it."""

import os
import re
import subprocess
import sys

import pytest

COMMAND = "import sys, sam_distill.cli.app; assert 'torch' not in sys.modules; import torch; torch.ones(1)"


@pytest.mark.skipif(sys.platform != "linux", reason="only there torch comes with GNU's library")
@pytest.mark.parametrize(
    ("users_own", "spins"), [({}, 0), ({"OMP_WAIT_POLICY": "ACTIVE"}, 30_000_000_000), ({"GOMP_SPINCOUNT": "7"}, 7)]
)
def test_threads_wait_without_spinning(users_own: dict[str, str], spins: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | users_own
    run = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)) == {str(spins)}
