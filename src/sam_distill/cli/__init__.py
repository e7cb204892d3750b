import os

# OpenMP's threads spin while they wait, unless told otherwise before torch is imported. Spinning, they take the cores
# from loader workers and from whatever else the machine does, which makes training several times slower.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
