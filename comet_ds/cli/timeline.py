# SPDX-License-Identifier: Apache-2.0
"""Show what every CTA of the GEMM kernels does in a layer: communication during computation.

Examples:
    python -m comet_ds timeline --ranks 2 --shapes qwen3-30b --out timelines
    python -m comet_ds timeline --draw timelines/qwen3-30b.json

The first runs one forward and backward of a layer. For every shape it writes a trace, which
https://ui.perfetto.dev opens, and a picture of rank 0 where matplotlib is installed. The second
draws a trace that was written before. In a training run, ``timeline_step`` in the "comet_ds" block
does the same for the first layer. ``comet_ds/observe/cta_timeline.py`` says what the shares mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from deepspeed import comm as dist

from comet_ds._compat.torch import occupy_gpu
from comet_ds.bench.peers import build, draw_tokens, step
from comet_ds.bench.shapes import Shape
from comet_ds.cli.arguments import (
    add_num_tokens,
    add_ranks,
    add_shapes,
    check_gpu,
    check_ranks,
    existing_file,
    make_parser,
    read_shapes,
)
from comet_ds.cli.ranks import launch_ranks
from comet_ds.kernels import load_kernels, num_sms, use_timeline_kernels
from comet_ds.layer import MoE
from comet_ds.observe.cta_timeline import Timeline, TimelineRecorder, describe, write


def record_shape(name: str, shape: Shape, num_tokens: int, folder: Path) -> None:
    """Record one forward and backward of a shape; rank 0 writes its timeline."""
    x, grad = draw_tokens(shape, num_tokens)
    layer = build(MoE, shape, comet_ds={"path": "fused"})
    for _ in range(3):
        step(layer, x, grad)
        layer.zero_grad(set_to_none=True)
    kernels = load_kernels(x.device)
    assert kernels is not None, "the layer is fused"
    recorder = TimelineRecorder(kernels, num_sms(x.device))
    occupy_gpu(50_000_000)  # until the host has enqueued all
    with recorder.recording():
        step(layer, x, grad)
    timeline = recorder.read()
    if dist.get_rank() > 0:
        return
    ranks = dist.get_world_size()
    title = f"{name}, {num_tokens} tokens a rank, {ranks} ranks: forward and backward of one layer"
    written = write(timeline, folder / name, title)
    print(f"{name}: {', '.join(map(str, written))}\n{describe(timeline)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("timeline", __doc__)
    add_shapes(parser)
    add_num_tokens(parser)
    add_ranks(parser, default=2)
    parser.add_argument("--out", type=Path, default=Path("timelines"), help="folder to write to")
    parser.add_argument("--draw", type=existing_file, help="trace to draw; nothing is run")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Parse the command line; record or draw."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.draw:
        timeline = Timeline.from_trace(json.loads(args.draw.read_text()))
        timeline.draw(args.draw.with_suffix(".png"), args.draw.stem)
        print(describe(timeline))
        return
    shapes = read_shapes(parser, args)
    check_ranks(parser, args.ranks, {name: s.num_experts for name, s in shapes.items()})
    check_gpu(parser)
    launch_ranks(["timeline", *arguments], args.ranks)
    use_timeline_kernels()
    for name, shape in shapes.items():
        record_shape(name, shape, args.num_tokens, args.out)
        torch.cuda.empty_cache()
