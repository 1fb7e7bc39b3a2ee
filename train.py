#!/usr/bin/env python
"""Trains a teacher, distils a student and records the result:  python train.py --method fsp

Where fastkd is installed the same is the command ``fastkd-train``.
"""

import os
import sys

try:
    from fastkd.training.cli import build_parser, main
except KeyboardInterrupt:
    # of several processes only the first prints it; fastkd.training.launch, which has these names, may not be
    # imported yet
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    if next(filter(None, ranks), "0") == "0":
        print("train.py: stopped before anything began", file=sys.stderr)
    sys.exit(130)

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
