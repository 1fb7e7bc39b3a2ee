"""The command line of ``python train.py`` in a clone and of ``fastkd-train`` where fastkd is installed.

Exit status 0; 2 for what the caller can mend, with one line on stderr; 1 where some of several runs failed
and the others are finished; 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import ExitStack, suppress

from fastkd.training.command import program
from fastkd.training.launch import is_first
from fastkd.training.parser import build_parser

__all__ = ["build_parser", "main"]


def load_plugins(arguments: list[str] | None) -> None:
    """Imports what ``--plugin`` names, so that the parser knows what it registers. Raises UserError."""
    from fastkd import plugins

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--plugin", action="append", default=[])
    with suppress(argparse.ArgumentError):  # a flag without its value, of which the whole parser tells
        for file in first.parse_known_args(arguments)[0].plugin:
            plugins.load(file)


def tell(text: str, speaks: bool) -> None:
    """One line on stderr, if this process ``speaks``: of several the first one does for all."""
    if speaks:
        print(f"{program()}: {text}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    stack = ExitStack()
    try:
        from fastkd.io.console import screens
        from fastkd.training import Interrupted, Recipe, Settings, UserError, repeat
        from fastkd.training.distributed import MeetingError
        from fastkd.training.own_flags import all_teachers
        from fastkd.training.signals import terminable

        stack.enter_context(screens())
        stack.enter_context(terminable())
        try:
            load_plugins(arguments)
        except UserError as error:
            tell(f"error: {error}", is_first())
            return 2
        flags = vars(build_parser().parse_args(arguments))
        fields = {field.name: flags.pop(field.name) for field in dataclasses.fields(Recipe)}
        try:
            times = flags.pop("repeats")
            given = (flags.pop(name) for name in ("teacher", "teacher_checkpoint", "teacher_points"))
            flags |= all_teachers(*given)
            flags["options"], flags["plugins"] = tuple(flags["options"]), tuple(flags["plugins"])
            repeat(
                Settings(
                    **flags, overrides={name: value for name, value in fields.items() if value is not None}
                ),
                times,
            )
        except UserError as error:
            tell(f"error: {error}", is_first() or isinstance(error, MeetingError))
            return error.status
        except Interrupted as stop:
            tell(str(stop), is_first())
            return stop.status
    except KeyboardInterrupt as stop:
        tell("stopped while nothing was being trained; what was finished is kept", is_first())
        return getattr(stop, "status", 130)
    finally:
        stack.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
