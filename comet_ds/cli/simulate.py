# SPDX-License-Identifier: Apache-2.0
"""Predict a layer's time on clusters that are not at hand.

    python -m comet_ds simulate --shapes qwen3-30b,mixtral-8x7b --ep-sizes 2,8,64,1024
    python -m comet_ds simulate --hidden 1024 --ffn 512 --experts 32 --top-k 4 --nic-gbit 200

One H200 a rank, bf16, an even routing. The fused path runs where the expert parallel group lies in
one NVLink domain, the pipelined one elsewhere. Printed are forward and forward + backward, what of
it is communication that computation does not hide ("exposed"), and the CTA splits: CTAs that
communicate beside up, down and backward through down and up, or the chunks that are fastest. The
limit is the larger of FLOP at ``PEAK_FLOPS`` and bytes at the link's rate.

Measured are the rates of one H200, and of the fused path with 2 and 4; the rest is simulated, also
the fused path on domains of several hosts or more than 32 ranks, where it does not run yet. What
``comet_ds.tuning.cost_model`` decides at run time comes from the same model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from comet_ds.bench.shapes import PEAK_FLOPS, Shape, add_shape_arguments, parse_shapes
from comet_ds.tuning.cost_model import (
    LINK_BYTES,
    MEMORY_BYTES,
    NIC_BYTES,
    PIPELINED_FLOPS,
    ChunkedLayer,
    LayerShape,
    Traffic,
    choose_split,
)

NUM_SMS = 132
# What the grouped GEMM kernels reach on large shapes under their own load, FLOP/s.
GEMM_FLOPS = 735e12
# Share of the time it takes to move a pass's operands and results that its products do not hide.
MEMORY_SHARE = {"up": 0.1, "down": 0.1, "down_grad": 0.37, "up_grad": 0.1, "weight_grad": 0.2}
LAUNCH_SECONDS = 1.5e-6  # between two kernels
MEETING_SECONDS = 8e-6
GATE_SECONDS_PER_ELEMENT = 1.3e-12  # of [T, H], logits and their part of backward alike
GATE_SECONDS_PER_SCORE = 3.6e-11  # of [T, E]


@dataclass(frozen=True)
class Cluster:
    """Where a group's ranks are.

    Attributes:
        num_ranks: W, a GPU each.
        domain: GPUs that reach each other by NVLink.
        nic_bytes: over the network, one direction and one GPU, bytes/s.
    """

    num_ranks: int
    domain: int = 8
    nic_bytes: float = NIC_BYTES

    @property
    def is_one_domain(self) -> bool:
        """Whether all ranks reach each other by NVLink."""
        return self.num_ranks <= self.domain


@dataclass(frozen=True)
class Prediction:
    """Times of one layer, ms.

    Attributes:
        path: that was simulated.
        cta_split: CTAs that communicate beside up, down, and backward through down and up; or
            chunks.
        limit_forward_ms, limit_both_ms: no layer is faster.
        forward_ms, both_ms: its times.
        exposed_forward_ms, exposed_both_ms: of these, communication that is not hidden.
    """

    path: str
    cta_split: tuple[int, ...]
    limit_forward_ms: float
    limit_both_ms: float
    forward_ms: float
    both_ms: float
    exposed_forward_ms: float
    exposed_both_ms: float


def predict(shape: Shape, num_tokens: int, cluster: Cluster) -> Prediction:
    """Return the times of a layer on every rank of a cluster.

    Args:
        shape: the layer's; its experts must spread evenly over the ranks.
        num_tokens: T of every rank.
        cluster: where the ranks are.

    Raises:
        ValueError: the experts do not.
    """
    if shape.num_experts % cluster.num_ranks:
        raise ValueError(
            f"experts must be a multiple of ranks, got {shape.num_experts} and {cluster.num_ranks}"
        )
    layer = _Layer(shape, num_tokens, cluster)
    simulate = _fused if cluster.is_one_domain else _pipelined
    path, cta_split, forward, backward, exposed = simulate(layer)
    times = (*layer.limits(), forward, forward + backward, exposed[0], sum(exposed))
    return Prediction(path, cta_split, *(1e3 * seconds for seconds in times))


class _Layer:
    """Bytes and FLOP of a layer on one rank; times are in seconds."""

    def __init__(self, shape: Shape, num_tokens: int, cluster: Cluster) -> None:
        self.shape, self.cluster, self.num_tokens = shape, cluster, num_tokens
        self.num_ups = 1 + shape.gated
        self.num_local = shape.num_experts // cluster.num_ranks
        self.rows = num_tokens * shape.top_k
        self.token_bytes = 2 * shape.hidden
        self.row_bytes = self.rows * self.token_bytes
        self.flop_per_row = 2 * shape.hidden * shape.ffn  # of a matrix
        self.layer_shape = LayerShape(
            (num_tokens,) * cluster.num_ranks,
            0,
            shape.top_k,
            shape.num_experts,
            self.num_ups,
            shape.hidden,
            shape.ffn,
            "bfloat16",
            NUM_SMS,
        )
        self.traffic = Traffic.expected(self.layer_shape)

    def limits(self) -> tuple[float, float]:
        """Return the least time of forward and of both."""
        flop = (self.num_ups + 1) * self.rows * self.flop_per_row / PEAK_FLOPS
        bytes_a_way = self.traffic.tokens * self.token_bytes  # once a rank, whatever the experts
        beyond = 1 - (min(self.cluster.domain, self.cluster.num_ranks) - 1) / max(
            self.cluster.num_ranks - 1, 1
        )
        rates = (1 - beyond) / LINK_BYTES, beyond / self.cluster.nic_bytes
        wire = 2 * bytes_a_way * max(rates)
        return max(flop, wire), max(3 * flop, 2 * wire)

    def gemm(self, kind: str, num_matrices: int, rate: float = GEMM_FLOPS) -> float:
        """Return the time of a pass over all rows."""
        flop = self.rows * self.flop_per_row * num_matrices
        wide = 2 * self.rows * self.shape.ffn  # bytes of an [R, F] tensor
        weights = 2 * self.num_local * self.shape.hidden * self.shape.ffn
        num_wide = {
            "up": 1 + self.num_ups,
            "down": 1,
            "down_grad": 1 + 2 * self.num_ups,
            "up_grad": self.num_ups,
            "weight_grad": 1,
        }[kind]
        moved = self.row_bytes + num_matrices * weights + num_wide * wide
        return flop / rate + MEMORY_SHARE[kind] * moved / MEMORY_BYTES

    def gemms(self, rate: float = GEMM_FLOPS) -> tuple[float, float]:
        """Return the time of all passes, forward and backward."""
        forward = self.gemm("up", self.num_ups, rate) + self.gemm("down", 1, rate)
        backward = self.gemm("down_grad", 1, rate) + self.gemm("up_grad", self.num_ups, rate)
        return forward, backward + (self.num_ups + 1) * self.gemm("weight_grad", 1, rate)

    def gate(self) -> tuple[float, float]:
        """Return the gate's time, forward and backward, with the sum of x's two gradients."""
        shape = self.shape
        logits = GATE_SECONDS_PER_ELEMENT * self.num_tokens * shape.hidden
        scores = GATE_SECONDS_PER_SCORE * self.num_tokens * shape.num_experts
        return logits + scores, 3 * logits + 0.3 * scores


def _fused(layer: _Layer) -> tuple[str, tuple[int, ...], float, float, tuple[float, float]]:
    traffic = layer.traffic
    is_alone = layer.cluster.num_ranks == 1
    cta_split = choose_split(layer.layer_shape)
    own_rows = layer.row_bytes / layer.cluster.num_ranks
    own = layer.num_tokens * layer.token_bytes
    slots = traffic.tokens * layer.token_bytes
    # A direction: tokens to where peers read them, own tokens to rows, rows and slots to sums.
    moves = (own + own_rows) + (own_rows + slots + own)
    publish = 2 * own / MEMORY_BYTES
    exchange = 0.0 if is_alone else publish + 2 * MEETING_SECONDS
    moves = moves / MEMORY_BYTES
    plan = 13e-6 + 1e-10 * layer.rows
    launches = 12 * LAUNCH_SECONDS
    beside = (0.0, 0.0)
    if not is_alone:
        beside = (
            cta_split.pull.seconds + cta_split.push.seconds - cta_split.is_pushed * publish,
            cta_split.pull_grad.seconds + cta_split.push_grad.seconds,
        )
    gemms, gate = layer.gemms(), layer.gate()
    forward = gate[0] + plan + moves + gemms[0] + launches + exchange + beside[0]
    dots = 2e-10 * layer.rows
    backward = gate[1] + dots + moves + gemms[1] + launches + exchange + beside[1]
    exposed = exchange + beside[0], exchange + beside[1]
    num_comm_ctas = () if is_alone else tuple(choice.num_comm_ctas for choice in cta_split)
    return "fused", num_comm_ctas, forward, backward, exposed


def _pipelined(
    layer: _Layer, num_chunks: int | None = None
) -> tuple[str, tuple[int, ...], float, float, tuple[float, float]]:
    cluster, gemms, gate = layer.cluster, layer.gemms(PIPELINED_FLOPS), layer.gate()
    domain, nic_bytes = cluster.domain, cluster.nic_bytes
    chunked = ChunkedLayer(
        layer.rows, layer.token_bytes, gemms, cluster.num_ranks, domain, nic_bytes
    )
    num_chunks = num_chunks or chunked.best()
    busy = chunked.seconds(num_chunks)
    moves = 6 * layer.row_bytes / MEMORY_BYTES  # rows in order of destination, and of expert
    forward, backward = (time + g + moves for time, g in zip(busy, gate, strict=True))
    on_device = chunked.device_seconds(num_chunks)
    exposed = on_device[0] - gemms[0], on_device[1] - gemms[1]
    return "pipelined", (num_chunks,), forward, backward, exposed


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and print a table."""
    parser = argparse.ArgumentParser(
        prog="comet_ds simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_arguments(parser)
    parser.add_argument("--num-tokens", type=int, default=8192, help="tokens a rank")
    parser.add_argument("--ep-sizes", default="1,2,4,8,16,32,64,128", help="W, comma-separated")
    parser.add_argument(
        "--experts-per-rank", type=int, help="have so many on every rank, not the shape's in all"
    )
    parser.add_argument("--domain", type=int, default=8, help="GPUs of an NVLink domain")
    parser.add_argument("--nic-gbit", type=float, default=400, help="network a GPU has, Gbit/s")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args(arguments)
    ranks = [int(count) for count in args.ep_sizes.split(",")]
    records = []
    print(
        "layer             W  path       cta_split     limit fwd    f+b    fwd (x)      f+b (x)"
        "     exposed fwd    f+b ms"
    )
    for name, shape in parse_shapes(parser, args).items():
        for num_ranks in ranks:
            if num_ranks < 1 or args.domain < 1 or args.num_tokens < 1 or args.nic_gbit <= 0:
                parser.error("ranks, domain, tokens and the network's rate must be positive")
            if args.experts_per_rank is not None:
                num_experts = args.experts_per_rank * num_ranks
                if num_experts < shape.top_k:
                    print(f"{name:14s} {num_ranks:4d}  {num_experts} experts are fewer than top_k")
                    continue
                shape = replace(shape, num_experts=num_experts)
            if shape.num_experts % num_ranks:
                print(f"{name:14s} {num_ranks:4d}  no even spread of {shape.num_experts} experts")
                continue
            cluster = Cluster(num_ranks, args.domain, args.nic_gbit * 1e9 / 8)
            r = predict(shape, args.num_tokens, cluster)
            records.append({"shape": name, **asdict(shape), **asdict(cluster), **asdict(r)})
            cta_split = "/".join(map(str, r.cta_split))
            ratios = r.forward_ms / r.limit_forward_ms, r.both_ms / r.limit_both_ms
            print(
                f"{name:14s} {num_ranks:4d}  {r.path:9s}  {cta_split:12s} "
                f"{r.limit_forward_ms:8.2f} "
                f"{r.limit_both_ms:6.2f} {r.forward_ms:8.2f} {ratios[0]:.2f} {r.both_ms:8.2f} "
                f"{ratios[1]:.2f} {r.exposed_forward_ms:10.2f} {r.exposed_both_ms:8.2f}"
            )
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))
