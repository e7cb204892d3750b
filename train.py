"""The paper's command: `python train.py strategy=decoupled encoder=tinyvit`, the same as `sam-distill train ...`."""

import sys

from sam_distill.cli.app import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
