#!/usr/bin/env python
"""Trains a teacher, distils a student and records the result:  python train.py --method fsp

Where fastkd is installed the same is the command ``fastkd-train``.
"""

import sys

try:
    from fastkd.training.cli import build_parser, main
except KeyboardInterrupt:
    print("train.py: stopped before anything began", file=sys.stderr)
    sys.exit(130)

__all__ = ["build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
