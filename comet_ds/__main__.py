# SPDX-License-Identifier: Apache-2.0
"""The command line: python -m comet_ds COMMAND ..."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Each module has main(arguments), and its docstring's first line says what it does.
COMMANDS = {"checkpoint": "comet_ds.checkpoints.command"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; without one, list them."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in COMMANDS:
        importlib.import_module(COMMANDS[command]).main(rest)
        return
    lines = [f"  {name:<12} {_summary(module)}" for name, module in COMMANDS.items()]
    text = "\n".join(["usage: python -m comet_ds COMMAND ...", *lines])
    if command not in ("-h", "--help"):
        sys.exit(f"unknown command {command!r}\n{text}")
    print(text)


def _summary(module: str) -> str:
    return importlib.import_module(module).__doc__.split("\n")[0]


if __name__ == "__main__":
    main()
