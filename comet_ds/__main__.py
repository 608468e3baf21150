# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m comet_ds COMMAND ...``, or ``comet_ds COMMAND ...``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

# Each is a module of comet_ds.cli with main(arguments), described by its docstring's first line.
COMMANDS = ("report", "bench", "tune", "simulate", "timeline", "dashboard", "checkpoint")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command, or list the commands where none is given."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in COMMANDS:
        _module(command).main(rest)
        return
    if command not in ("-h", "--help"):
        sys.exit(f"unknown command {command!r}, known: {', '.join(COMMANDS)}")
    lines = [f"  {name:<12} {_summary(name)}" for name in COMMANDS]
    print("\n".join(["usage: python -m comet_ds COMMAND ...", "", *lines, ""]))
    print("python -m comet_ds COMMAND --help shows a command's options and examples.")


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"comet_ds.cli.{command}")


def _summary(command: str) -> str:
    return (_module(command).__doc__ or "").split("\n")[0]


if __name__ == "__main__":
    main()
