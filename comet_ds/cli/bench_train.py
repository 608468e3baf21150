# SPDX-License-Identifier: Apache-2.0
"""Train a whole model with each of several MoE layers in turn, and compare their steps.

Examples:
    python -m comet_ds bench train --ranks 2
    python -m comet_ds bench train --ranks 2 --shapes qwen3-30b --moe comet_ds,autoep --no-drop
    python -m comet_ds bench train --ranks 2 --moe comet_ds,comet_ds:path=pipelined --zero 1,2

Without a GPU everything runs except what needs one, to try things out.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict

import deepspeed
import torch
from deepspeed import comm as dist

from comet_ds.bench import train
from comet_ds.bench.models import Variant, Workload, load_example
from comet_ds.bench.shapes import Shape
from comet_ds.bench.train import Plan
from comet_ds.cli.arguments import (
    add_json,
    add_ranks,
    add_shapes,
    check_ranks,
    existing_file,
    make_parser,
    positive_float,
    positive_int,
    positive_ints,
    read_shapes,
)
from comet_ds.cli.ranks import launch_ranks

DEFAULT_SHAPES = "qwen3-30b,qwen2-moe,mixtral-8x7b"
DEFAULT_LAYERS = {"mixtral-8x7b": 2, "phi-3.5-moe": 4}  # 8 of other shapes; they fit two GPUs


def _stages(text: str) -> list[int]:
    stages = text.split(",")
    if wrong := [stage for stage in stages if stage not in ("0", "1", "2")]:
        raise argparse.ArgumentTypeError(f"the ZeRO stage must be 0, 1 or 2, got {wrong[0]}")
    return [int(stage) for stage in stages]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("bench train", __doc__, train.__doc__)
    add_shapes(parser, DEFAULT_SHAPES)
    parser.add_argument(
        "--moe",
        default="comet_ds,autoep,deepspeed",
        help="comma-separated layers, each with its options (default: %(default)s)",
    )
    parser.add_argument("--layers", type=positive_int, help="default: 8; Mixtral 2, Phi-3.5 4")
    parser.add_argument("--heads", type=positive_int, default=16, help="heads of the attention")
    parser.add_argument("--seq-len", type=positive_int, default=1024, help="tokens of a sequence")
    parser.add_argument(
        "--batch", type=positive_int, default=8, help="sequences of a rank in a micro-batch"
    )
    parser.add_argument(
        "--micro-batches",
        type=positive_ints,
        default=[4],
        help="micro-batches of a step, comma-separated",
    )
    parser.add_argument("--zero", type=_stages, default=[1], help="ZeRO stages, comma-separated")
    parser.add_argument("--capacity-factor", type=positive_float, default=1.0)
    parser.add_argument("--no-drop", action="store_true", help="drop no routes: drop_tokens=False")
    add_ranks(parser, default=1)
    parser.add_argument(
        "--rounds", type=positive_int, default=Plan.rounds, help="rounds; all layers run in each"
    )
    parser.add_argument(
        "--blocks", type=positive_int, default=Plan.blocks, help="timed blocks of a round"
    )
    parser.add_argument("--steps", type=positive_int, default=Plan.steps, help="steps of a block")
    parser.add_argument(
        "--warmup", type=positive_int, default=Plan.warmup, help="steps before the blocks"
    )
    parser.add_argument("--phases", action="store_true", help="time forward, backward, optimizer")
    parser.add_argument(
        "--config", type=existing_file, default=Plan.config, help="DeepSpeed configuration"
    )
    add_json(parser)
    return parser


def parse_args(
    arguments: Sequence[str],
) -> tuple[argparse.Namespace, list[Workload], list[Variant]]:
    """Read the command line; exit where something does not fit."""
    parser = _parser()
    args = parser.parse_args(arguments)
    shapes = read_shapes(parser, args)
    check_ranks(parser, args.ranks, {name: s.num_experts for name, s in shapes.items()})
    try:
        works = read_workloads(args, shapes)
        variants = [Variant.parse(label) for label in args.moe.split(",")]
    except ValueError as error:
        parser.error(str(error))
    return args, works, variants


def read_workloads(args: argparse.Namespace, shapes: dict[str, Shape]) -> list[Workload]:
    """Return all workloads asked for.

    Raises:
        ValueError: experts that are not gated, or a hidden size that heads do not divide.
    """
    works = [
        Workload(
            shape=name,
            hidden=shape.hidden,
            ffn=shape.ffn,
            experts=shape.num_experts,
            top_k=shape.top_k,
            layers=args.layers or DEFAULT_LAYERS.get(name, 8),
            heads=args.heads,
            seq_len=args.seq_len,
            batch=args.batch,
            micro_batches=micro_batches,
            zero=zero,
            capacity_factor=args.capacity_factor,
            no_drop=args.no_drop,
        )
        for name, shape in shapes.items()
        for zero, micro_batches in itertools.product(args.zero, args.micro_batches)
    ]
    if ungated := [name for name, shape in shapes.items() if not shape.gated]:
        raise ValueError(f"the example's experts are gated, those of {', '.join(ungated)} are not")
    for work in works:
        if work.hidden % work.heads:
            raise ValueError(f"hidden must be a multiple of heads, got {work.hidden}, {work.heads}")
    return works


def main(arguments: Sequence[str]) -> None:
    """Run every workload; ``arguments`` are those behind ``train``."""
    args, works, variants = parse_args(arguments)
    example = load_example()
    launch_ranks(["bench", "train", *arguments], args.ranks)
    names = ("rounds", "blocks", "steps", "warmup", "phases", "config")
    plan = Plan(**{name: vars(args)[name] for name in names})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    is_first = dist.get_rank() == 0
    if is_first:
        versions = f"torch {torch.__version__}, deepspeed {deepspeed.__version__}"
        blocks = f"medians of {plan.rounds} x {plan.blocks} blocks of {plan.steps} steps"
        print(f"{dist.get_world_size()} x {device}, {versions}, {blocks}", flush=True)
    records = []
    for work in works:
        records.append(train.bench(example, work, variants, plan))
        if is_first:
            print("\n".join(train.table(records[-1], work.describe())), flush=True)
    if is_first:
        print("\n".join(["", *train.ratios(records)]), flush=True)
    if args.json and is_first:
        facts = {
            "device": device,
            "num_ranks": dist.get_world_size(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "plan": {**asdict(plan), "config": str(plan.config)},
        }
        args.json.write_text(json.dumps({**facts, "workloads": records}, indent=1))
    dist.destroy_process_group()  # its threads must not outlive the interpreter
