"""The arguments of a command: what is wrong with them is one line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here one line names the command and what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def whole(text: str) -> int:
    """A whole number, as the ``type`` of an argument."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted a whole number") from None


def natural(text: str) -> int:
    """A whole number that is not negative, as the ``type`` of an argument."""
    value = whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted a whole number from 0 on")
    return value


def number(text: str) -> float:
    """A number, as the ``type`` of an argument."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted a number") from None
