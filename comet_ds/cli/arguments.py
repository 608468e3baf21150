# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and the rules for their values."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from comet_ds.bench.shapes import SHAPES, Shape


def make_parser(
    command: str, description: str | None, details: str | None = None
) -> argparse.ArgumentParser:
    """Return a command's parser.

    Args:
        command: words that follow ``comet_ds``.
        description: shown above the options: what the command does, with examples.
        details: shown below the options.
    """
    return argparse.ArgumentParser(
        prog=f"comet_ds {command}",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive_int(text: str) -> int:
    """Read a count of at least 1."""
    return int(_positive(text, int))


def positive_float(text: str) -> float:
    """Read a number above 0."""
    return _positive(text, float)


def positive_ints(text: str) -> list[int]:
    """Read comma-separated counts of at least 1."""
    return [positive_int(part) for part in text.split(",")]


def _positive(text: str, kind: type) -> float:
    rule = "a whole number of at least 1" if kind is int else "a number above 0"
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
    return value


def existing_file(text: str) -> Path:
    """Read the path of a file that exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"must be a file that exists, got {text!r}")
    return Path(text)


def add_shapes(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the options that ``read_shapes`` reads; ``default`` is that of ``--shapes``."""
    parser.add_argument(
        "--shapes",
        default=default or ",".join(SHAPES),
        help=f"comma-separated names of {', '.join(SHAPES)} (default: %(default)s)",
    )
    parser.add_argument("--hidden", type=positive_int, help="H of a shape of your own")
    parser.add_argument("--ffn", type=positive_int, help="F of a shape of your own")
    parser.add_argument("--experts", type=positive_int, help="E of a shape of your own")
    parser.add_argument("--top-k", type=positive_int, help="K of a shape of your own")
    parser.add_argument(
        "--gelu", action="store_true", help="a shape of your own has GELU experts with biases"
    )


def add_num_tokens(parser: argparse.ArgumentParser) -> None:
    """Add ``--num-tokens``."""
    parser.add_argument("--num-tokens", type=positive_int, default=8192, help="tokens of a rank")


def add_ranks(parser: argparse.ArgumentParser, default: int) -> None:
    """Add ``--ranks``, which ``check_ranks`` checks."""
    parser.add_argument(
        "--ranks",
        type=positive_int,
        default=default,
        help="GPUs of this host, a rank each (default: %(default)s)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", type=Path, help="file to write all figures to")


def read_shapes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Shape]:
    """Return the shapes asked for by name or by sizes; exit where they do not fit."""
    sizes = {"hidden": args.hidden, "ffn": args.ffn, "experts": args.experts, "top-k": args.top_k}
    if any(sizes.values()):
        if missing := [f"--{name}" for name, size in sizes.items() if not size]:
            parser.error(f"a shape of your own also needs {', '.join(missing)}")
        if args.top_k > args.experts:
            parser.error(f"--top-k must be at most --experts, got {args.top_k} and {args.experts}")
        return {"given": Shape(*sizes.values(), gated=not args.gelu)}
    names = args.shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"unknown shapes {unknown}, known: {', '.join(SHAPES)}")
    return {name: SHAPES[name] for name in names}


def check_ranks(
    parser: argparse.ArgumentParser, num_ranks: int, num_experts: Mapping[str, int]
) -> None:
    """Exit unless this host has enough GPUs, if any, and experts spread evenly over the ranks.

    Args:
        parser: of the command.
        num_ranks: as asked for.
        num_experts: experts by name of a shape.
    """
    for name, count in num_experts.items():
        if count % num_ranks:
            got = f"got {count} experts ({name}) and {num_ranks} ranks"
            parser.error(f"experts must be a multiple of --ranks, {got}")
    num_gpus = torch.cuda.device_count()
    if num_gpus and num_ranks > num_gpus:
        parser.error(f"--ranks must be at most this host's {num_gpus} GPUs, got {num_ranks}")


def check_gpu(parser: argparse.ArgumentParser) -> None:
    """Exit where there is no GPU."""
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU, and torch finds none")
