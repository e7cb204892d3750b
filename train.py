"""The paper's command: `python train.py strategy=decoupled encoder=tinyvit`, the same as `sam-distill train ...`."""

import sys

from sam_distill.cli.app import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
