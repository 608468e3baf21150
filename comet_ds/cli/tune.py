# SPDX-License-Identifier: Apache-2.0
"""Measure the CTA splits of layers on this host's GPUs, ahead of a run.

Examples:
    python -m comet_ds tune --ranks 2 --hidden 2048 --ffn 768 --experts 128 --top-k 8
    python -m comet_ds tune --ranks 8 --config ds_config.json --shapes qwen3-30b --num-tokens 4096

The CTA split of each GEMM is varied in turn, beginning with the cost model's, and the fastest is
kept. The time of forward decides for the two GEMMs of forward, the time of forward and backward for
the other two. Candidates are timed interleaved; the slowest rank counts. The result goes to the
table that the configuration names (``tuning_table``), by default the user's, where every run with
the same layer on as many ranks finds it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor

from comet_ds.bench.peers import build, draw_tokens, step
from comet_ds.bench.shapes import Shape
from comet_ds.bench.timing import Timer, slowest_rank
from comet_ds.cli.arguments import (
    add_num_tokens,
    add_ranks,
    add_shapes,
    check_gpu,
    check_ranks,
    existing_file,
    make_parser,
    positive_int,
    read_shapes,
)
from comet_ds.cli.ranks import launch_ranks
from comet_ds.config import CometConfig, read_block
from comet_ds.fused.peer.connect import exchange_of
from comet_ds.layer import MoE
from comet_ds.tuning.cost_model import CtaSplit, LayerShape, choose_split
from comet_ds.tuning.table import candidates, default_path, write

FORWARD_FIELDS = ("pull", "push")
GAIN = 0.005  # a candidate must be faster by this share to be taken


def time_splits(
    layer: MoE, cta_splits: list[CtaSplit], x: Tensor, grad: Tensor, num_runs: int
) -> list[tuple[float, float]]:
    """Return the ms of forward, and of forward and backward, with every CTA split.

    They are medians over interleaved runs, on the slowest rank. Collective.
    """
    exchange = exchange_of(layer.deepspeed_moe.ep_group)
    samples: list[list[list[float]]] = [[] for _ in cta_splits]
    for _ in range(num_runs):
        for cta_split, found in zip(cta_splits, samples, strict=True):
            exchange.policy.pinned = cta_split
            timer = Timer(hide_host_ms=20.0)
            step(layer, x, grad, timer.mark)
            timer.mark()
            found.append(timer.read())
            layer.zero_grad(set_to_none=True)
    exchange.policy.pinned = None
    medians = [[statistics.median(times) for times in zip(*s, strict=True)] for s in samples]
    return [(forward, both) for forward, both in slowest_rank(medians, x.device)]


class Tuned(NamedTuple):
    """The fastest CTA split of a layer.

    Attributes:
        cta_split: the split.
        ms: forward and backward with it.
        default_ms: forward and backward with the cost model's split.
        worst_ms: forward and backward with the slowest split that was tried.
    """

    cta_split: CtaSplit
    ms: float
    default_ms: float
    worst_ms: float


def tune(layer: MoE, shape: LayerShape, x: Tensor, grad: Tensor, num_runs: int) -> Tuned:
    """Find the fastest CTA split; all ranks return the same. Collective.

    Args:
        layer: has run once.
        shape: the layer's, on this rank.
        x, grad: [T, H] input and gradient of the output.
        num_runs: runs to take a median of.
    """
    best, worst_ms = (default := choose_split(shape)), 0.0
    for field in CtaSplit._fields:
        choices = [best, *candidates(best, shape)[field]]
        times = time_splits(layer, choices, x, grad, num_runs)
        part = 0 if field in FORWARD_FIELDS else 1
        fastest = min(range(len(choices)), key=lambda i: times[i][part])
        if times[fastest][part] < (1 - GAIN) * times[0][part]:
            best = choices[fastest]
        worst_ms = max(worst_ms, *(both for _, both in times))
    (_, before), (_, after) = time_splits(layer, [default, best], x, grad, 2 * num_runs)
    if after > before:
        best, after = default, before
    return Tuned(best, after, before, worst_ms)


def tune_shape(
    name: str, shape: Shape, num_tokens: int, num_runs: int, config: CometConfig
) -> None:
    """Tune one shape; write the result and print it, on rank 0."""
    x, grad = draw_tokens(shape, num_tokens)
    layer = build(MoE, shape, comet_ds={**config.layer_options(), "path": "fused"})
    step(layer, x, grad)
    exchange = exchange_of(layer.deepspeed_moe.ep_group)
    layer_shape = layer.deepspeed_moe.fused.shape
    found = tune(layer, layer_shape, x, grad, num_runs)
    if dist.get_rank() == 0:
        path = Path(config.tuning_table or default_path())
        write(path, layer_shape, exchange.policy.origin, found.cta_split, found.ms)
        times = f"{found.default_ms:7.3f} -> {found.ms:7.3f} ms, worst {found.worst_ms:7.3f}"
        print(f"{name:14s} {times}  {found.cta_split.describe()}  {path}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("tune", __doc__)
    add_shapes(parser)
    parser.add_argument(
        "--config", type=existing_file, help="DeepSpeed configuration, for its comet_ds block"
    )
    add_num_tokens(parser)
    parser.add_argument("--num-runs", type=positive_int, default=7, help="runs to take medians of")
    add_ranks(parser, default=2)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and tune every shape."""
    parser = _parser()
    args = parser.parse_args(arguments)
    shapes = read_shapes(parser, args)
    try:
        config = CometConfig.parse(read_block(args.config and str(args.config)))
    except ValueError as error:
        parser.error(str(error))
    if args.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {args.ranks}: one rank has nothing to tune")
    check_ranks(parser, args.ranks, {name: s.num_experts for name, s in shapes.items()})
    check_gpu(parser)
    launch_ranks(["tune", *arguments], args.ranks)
    for name, shape in shapes.items():
        tune_shape(name, shape, args.num_tokens, args.num_runs, config)
        torch.cuda.empty_cache()
