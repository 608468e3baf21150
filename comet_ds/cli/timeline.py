# SPDX-License-Identifier: Apache-2.0
"""Show what every CTA of the GEMM kernels does in a layer: communication beside computation.

    python -m comet_ds timeline --ranks 2 --shapes qwen3-30b --out timelines
    python -m comet_ds timeline --draw timelines/qwen3-30b.json

The first runs one forward and backward of a layer, and writes for every shape a trace that
https://ui.perfetto.dev opens and, where matplotlib is installed, a picture of rank 0; the second
draws a trace written elsewhere. In a training run the configuration's ``timeline_step`` does the
same for the first layer. ``recorder.py`` says what the shares mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from deepspeed import comm as dist

from comet_ds.bench.peers import build, draw_tokens, step
from comet_ds.bench.ranks import launch_ranks
from comet_ds.bench.shapes import Shape, add_shape_arguments, parse_shapes
from comet_ds.kernels import load_kernels, num_sms, use_timeline_kernels
from comet_ds.layer import MoE
from comet_ds.observe.cta_timeline import Timeline, TimelineRecorder, describe, write


def record_shape(name: str, shape: Shape, num_tokens: int, folder: Path) -> None:
    """Record one forward and backward of a shape, write it on rank 0."""
    x, grad = draw_tokens(shape, num_tokens)
    layer = build(MoE, shape, comet_ds={"path": "fused"})
    for _ in range(3):
        step(layer, x, grad)
        layer.zero_grad(set_to_none=True)
    recorder = TimelineRecorder(load_kernels(x.device), num_sms(x.device))
    torch.cuda._sleep(50_000_000)  # hides the host
    with recorder.recording():
        step(layer, x, grad)
    timeline = recorder.read()
    if dist.get_rank() > 0:
        return
    ranks = dist.get_world_size()
    title = f"{name}, {num_tokens} tokens a rank, {ranks} ranks: forward and backward of one layer"
    written = write(timeline, folder / name, title)
    print(f"{name}: {', '.join(map(str, written))}\n{describe(timeline)}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Parse the command line; record or draw."""
    parser = argparse.ArgumentParser(
        prog="comet_ds timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_arguments(parser)
    parser.add_argument("--num-tokens", type=int, default=8192, help="tokens a rank")
    parser.add_argument("--ranks", type=int, default=2, help="GPUs of this host, a rank each")
    parser.add_argument("--out", type=Path, default=Path("timelines"), help="folder to write to")
    parser.add_argument("--draw", type=Path, help="trace to draw; runs nothing")
    args = parser.parse_args(arguments)
    if args.draw:
        timeline = Timeline.from_trace(json.loads(args.draw.read_text()))
        timeline.draw(args.draw.with_suffix(".png"), args.draw.stem)
        print(describe(timeline))
        return
    shapes = parse_shapes(parser, args)
    if not torch.cuda.is_available():
        parser.error("recording needs CUDA devices")
    launch_ranks(["timeline", *arguments], args.ranks)
    use_timeline_kernels()
    for name, shape in shapes.items():
        record_shape(name, shape, args.num_tokens, args.out)
        torch.cuda.empty_cache()
