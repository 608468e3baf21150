# SPDX-License-Identifier: Apache-2.0
"""Check and time a layer against other MoE layers; with ``train``, a whole model.

Examples:
    python -m comet_ds bench --shapes qwen2-moe,mixtral-8x7b
    python -m comet_ds bench --hidden 1024 --ffn 512 --experts 32 --top-k 4 --num-tokens 2048
    python -m comet_ds bench --ranks 2 --autoep --json result.json
    python -m comet_ds bench --ranks 2 --shapes mixtral-8x7b --no-drop --skew 0.01,0.05
    python -m comet_ds bench train --ranks 2
    python -m comet_ds bench train --help
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from comet_ds.bench import layers
from comet_ds.cli import bench_train
from comet_ds.cli.arguments import (
    add_json,
    add_num_tokens,
    add_ranks,
    add_shapes,
    check_gpu,
    check_ranks,
    make_parser,
    positive_int,
    read_shapes,
)
from comet_ds.cli.ranks import launch_ranks


def _deviations(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= std < 1 for std in found):
        raise argparse.ArgumentTypeError(f"must be numbers from 0 to 1, got {text!r}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("bench", __doc__, layers.__doc__)
    add_shapes(parser)
    add_num_tokens(parser)
    parser.add_argument("--num-runs", type=positive_int, default=20, help="runs to take medians of")
    parser.add_argument(
        "--path", default="auto", choices=("auto", "fused", "pipelined"), help="path of our layer"
    )
    parser.add_argument("--no-drop", action="store_true", help="drop no routes: drop_tokens=False")
    parser.add_argument(
        "--skew",
        type=_deviations,
        default=[0.0],
        help="comma-separated standard deviations of the experts' shares of the routes",
    )
    parser.add_argument("--autoep", action="store_true", help="time DeepSpeed's AutoEP too")
    add_ranks(parser, default=1)
    add_json(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run ``bench train``, or parse the command line and run every shape."""
    if arguments[:1] == ["train"]:
        bench_train.main(arguments[1:])
        return
    parser = _parser()
    args = parser.parse_args(arguments)
    shapes = read_shapes(parser, args)
    check_ranks(parser, args.ranks, {name: s.num_experts for name, s in shapes.items()})
    check_gpu(parser)
    launch_ranks(["bench", *arguments], args.ranks)
    device, num_ranks = torch.cuda.get_device_name(), dist.get_world_size()
    if dist.get_rank() == 0:
        print(f"{num_ranks} x {device}, torch {torch.__version__}, medians of {args.num_runs}")
    records = []
    for (name, shape), skew in itertools.product(shapes.items(), args.skew):
        options: dict[str, Any] = {"comet_ds": {"path": args.path}, "drop_tokens": not args.no_drop}
        options |= {"with_autoep": args.autoep, "skew": skew}
        records.append(layers.bench(name, shape, args.num_tokens, args.num_runs, **options))
        torch.cuda.empty_cache()
    if args.json and dist.get_rank() == 0:
        facts = {"device": device, "num_ranks": num_ranks, "torch": torch.__version__}
        args.json.write_text(json.dumps({**facts, "shapes": records}, indent=1))
