import os

# OpenMP threads spin while they wait, unless a variable set before the import of torch forbids it. Spinning threads
# take cores from loader workers and from other programs, which makes training several times slower.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
