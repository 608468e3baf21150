# SPDX-License-Identifier: Apache-2.0
"""Measure the CTA splits of layers on this host's GPUs, ahead of a run.

    python -m comet_ds tune --ranks 2 --hidden 2048 --ffn 768 --experts 128 --top-k 8
    python -m comet_ds tune --ranks 8 --config ds_config.json --shapes qwen3-30b --num-tokens 4096

Each GEMM's points are varied in turn, from the cost model's on, and the fastest kept: forward alone
decides for its two, forward and backward for the other two. Choices are timed interleaved; the
slowest rank counts. The result goes to the table the configuration names (``tuning_table``), by
default the user's, where every run with the same layer on as many ranks finds it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed import comm as dist
from torch import Tensor

from comet_ds.bench.peers import build, draw_tokens, step
from comet_ds.bench.ranks import launch_ranks
from comet_ds.bench.shapes import Shape, add_shape_arguments, parse_shapes
from comet_ds.bench.timing import Timer, slowest_rank
from comet_ds.config import CometConfig, read_block
from comet_ds.fused.peer.exchange import exchange_of
from comet_ds.layer import MoE
from comet_ds.tuning.cost_model import CtaSplit, LayerShape, choose_split
from comet_ds.tuning.table import candidates, default_path, write

FORWARD_FIELDS = ("pull", "push")
# A choice must be this much faster to replace another.
GAIN = 0.005


def time_splits(
    layer: MoE, cta_splits: list[CtaSplit], x: Tensor, grad: Tensor, num_runs: int
) -> list[tuple[float, float]]:
    """Return the ms of forward, and of forward and backward, with every cta_split.

    Medians over interleaved runs, the slowest rank's. Collective.
    """
    exchange = exchange_of(layer.deepspeed_moe.ep_group)
    samples: list[list[list[float]]] = [[] for _ in cta_splits]
    for _ in range(num_runs):
        for cta_split, found in zip(cta_splits, samples, strict=True):
            exchange.cta_split = cta_split
            timer = Timer(hide_host_ms=20.0)
            step(layer, x, grad, timer.mark)
            timer.mark()
            found.append(timer.read())
            layer.zero_grad(set_to_none=True)
    exchange.cta_split = None
    medians = [[statistics.median(times) for times in zip(*s, strict=True)] for s in samples]
    return [(forward, both) for forward, both in slowest_rank(medians, x.device)]


class Tuned(NamedTuple):
    """Points found, and the ms of forward and backward with them.

    Attributes:
        cta_split: the best.
        ms, default_ms, worst_ms: with these, with the cost model's, with the worst that was tried.
    """

    cta_split: CtaSplit
    ms: float
    default_ms: float
    worst_ms: float


def tune(layer: MoE, shape: LayerShape, x: Tensor, grad: Tensor, num_runs: int) -> Tuned:
    """Find the best points; all ranks return the same.

    Args:
        layer: has run once.
        shape: of the layer, on this rank.
        x, grad: [T, H] input and gradient of the output.
        num_runs: medians are taken of these.
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
    layer = build(MoE, shape, comet_ds=config.model_copy(update={"path": "fused"}))
    step(layer, x, grad)
    exchange = exchange_of(layer.deepspeed_moe.ep_group)
    layer_shape = layer.deepspeed_moe.fused.shape
    found = tune(layer, layer_shape, x, grad, num_runs)
    if dist.get_rank() == 0:
        path = Path(config.tuning_table or default_path())
        write(path, layer_shape, exchange.origin, found.cta_split, found.ms)
        choices = found.cta_split._asdict().items()
        points = ", ".join(f"{field} {'/'.join(map(str, v[:2]))}" for field, v in choices)
        times = f"{found.default_ms:7.3f} -> {found.ms:7.3f} ms, worst {found.worst_ms:7.3f}"
        print(f"{name:14s} {times}  {points}  {path}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and tune every shape."""
    parser = argparse.ArgumentParser(
        prog="comet_ds tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_arguments(parser)
    parser.add_argument("--config", type=Path, help="DeepSpeed JSON, for its comet_ds block")
    parser.add_argument("--num-tokens", type=int, default=8192, help="tokens a rank")
    parser.add_argument("--num-runs", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs of this host, a rank each")
    args = parser.parse_args(arguments)
    shapes = parse_shapes(parser, args)
    try:
        config = CometConfig.parse(read_block(args.config and str(args.config)))
    except (ValueError, json.JSONDecodeError) as error:
        parser.error(str(error))
    if args.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {args.ranks}: points are between ranks")
    if not torch.cuda.is_available():
        parser.error("timing needs CUDA devices")
    launch_ranks(["tune", *arguments], args.ranks)
    for name, shape in shapes.items():
        tune_shape(name, shape, args.num_tokens, args.num_runs, config)
        torch.cuda.empty_cache()
