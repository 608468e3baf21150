# SPDX-License-Identifier: Apache-2.0
"""Predict a layer's time on clusters that are not at hand.

Examples:
    python -m comet_ds simulate --shapes qwen3-30b,mixtral-8x7b --ep-sizes 2,8,64,1024
    python -m comet_ds simulate --hidden 1024 --ffn 512 --experts 32 --top-k 4 --nic-gbit 200

A rank has one GPU; layers are bf16 and the routing is even. The path is fused where the expert
parallel group lies in one NVLink domain, pipelined elsewhere. The table shows the times of forward
and of forward + backward, how much of them is communication that computation does not hide
("exposed"), and the CTA splits: CTAs that communicate during up, down, down's backward and a weight
gradient. On the pipelined path the same column shows the number of chunks. The limit is the larger
of the GEMMs' time at ``limit_flops`` and the bytes' time on the link (comet_ds/tuning/hardware.py).

The rates are measured on one H200, and the fused path on 2 and 4. Everything else is simulated,
also an H100, and the fused path on domains of several hosts or more than 32 ranks, where it does
not run yet. The same cost model chooses CTA splits and chunks at run time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from comet_ds.bench.shapes import Shape
from comet_ds.cli.arguments import (
    add_json,
    add_num_tokens,
    add_shapes,
    make_parser,
    positive_float,
    positive_int,
    positive_ints,
    read_shapes,
)
from comet_ds.tuning.cost_model import ChunkedLayer, LayerShape, Traffic, choose_split
from comet_ds.tuning.hardware import H100, H200, NIC_BYTES_PER_S, Hardware

GPUS = {"h200": H200, "h100": H100}
# Share of the time to read a pass's operands and write its results that its products do not hide.
MEMORY_SHARE = {"up": 0.1, "down": 0.1, "down_grad": 0.37, "up_grad": 0.1, "weight_grad": 0.2}
LAUNCH_SECONDS = 1.5e-6  # between two kernels
BARRIER_SECONDS = 8e-6
GATE_SECONDS_PER_ELEMENT = 1.3e-12  # of [T, H]; three times that in backward
GATE_SECONDS_PER_SCORE = 3.6e-11  # of [T, E]


@dataclass(frozen=True)
class Cluster:
    """The GPUs of an expert parallel group and their links.

    Attributes:
        num_ranks: W, a GPU each.
        domain: GPUs that reach each other by NVLink.
        nic_bytes_per_s: the network, one direction and one GPU.
        hardware: every GPU's rates.
    """

    num_ranks: int
    domain: int = 8
    nic_bytes_per_s: float = NIC_BYTES_PER_S
    hardware: Hardware = H200

    @property
    def is_one_domain(self) -> bool:
        """Whether all ranks reach each other by NVLink."""
        return self.num_ranks <= self.domain


@dataclass(frozen=True)
class Prediction:
    """Times of one layer, ms.

    Attributes:
        path: the path that was simulated.
        cta_split: CTAs that communicate during up, down, down's backward and a weight gradient;
            on the pipelined path the number of chunks alone.
        limit_forward_ms, limit_both_ms: limits of forward and of forward + backward.
        forward_ms, both_ms: times of forward and of forward + backward.
        exposed_forward_ms, exposed_both_ms: the part of these that communication adds.
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
        ValueError: the experts do not spread evenly.
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
        self.hardware = cluster.hardware
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
            cluster.hardware.num_sms,
        )
        self.traffic = Traffic.expected(self.layer_shape, cluster.hardware)

    def limits(self) -> tuple[float, float]:
        """Return the limits of forward and of forward + backward."""
        flop = (self.num_ups + 1) * self.rows * self.flop_per_row / self.hardware.limit_flops
        # A token crosses the link once for all its experts on a rank, and comes back as one sum.
        one_way_bytes = self.traffic.tokens * self.token_bytes
        beyond = 1 - (min(self.cluster.domain, self.cluster.num_ranks) - 1) / max(
            self.cluster.num_ranks - 1, 1
        )
        seconds_per_byte = (
            (1 - beyond) / self.hardware.link_bytes_per_s,
            beyond / self.cluster.nic_bytes_per_s,
        )
        wire = 2 * one_way_bytes * max(seconds_per_byte)
        return max(flop, wire), max(3 * flop, 2 * wire)

    def gemm(self, kind: str, num_matrices: int, flops: float) -> float:
        """Return the time of a pass over all rows, its products at this many FLOP/s."""
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
        return flop / flops + MEMORY_SHARE[kind] * moved / self.hardware.memory_bytes_per_s

    def gemms(self, flops: float) -> tuple[float, float]:
        """Return the time of all passes, forward and backward, products at this many FLOP/s."""
        forward = self.gemm("up", self.num_ups, flops) + self.gemm("down", 1, flops)
        backward = self.gemm("down_grad", 1, flops) + self.gemm("up_grad", self.num_ups, flops)
        return forward, backward + (self.num_ups + 1) * self.gemm("weight_grad", 1, flops)

    def gate(self) -> tuple[float, float]:
        """Return the gate's time in forward and in backward, which adds up x's two gradients."""
        shape = self.shape
        logits = GATE_SECONDS_PER_ELEMENT * self.num_tokens * shape.hidden
        scores = GATE_SECONDS_PER_SCORE * self.num_tokens * shape.num_experts
        return logits + scores, 3 * logits + 0.3 * scores


def _fused(layer: _Layer) -> tuple[str, tuple[int, ...], float, float, tuple[float, float]]:
    traffic, hardware = layer.traffic, layer.hardware
    is_alone = layer.cluster.num_ranks == 1
    cta_split = choose_split(layer.layer_shape, hardware)
    own_rows = layer.row_bytes / layer.cluster.num_ranks
    own = layer.num_tokens * layer.token_bytes
    slots = traffic.tokens * layer.token_bytes
    # In a direction tokens are copied to where peers read them, own tokens are copied to their
    # rows, and rows and the peers' sums are added up.
    moves = (own + own_rows) + (own_rows + slots + own)
    publish = 2 * own / hardware.memory_bytes_per_s
    exchange = 0.0 if is_alone else publish + 2 * BARRIER_SECONDS
    moves = moves / hardware.memory_bytes_per_s
    plan = 13e-6 + 1e-10 * layer.rows
    launches = 12 * LAUNCH_SECONDS
    overlapped = (0.0, 0.0)  # what communication adds to the GEMMs it overlaps with
    if not is_alone:
        overlapped = (
            cta_split.pull.seconds + cta_split.push.seconds - cta_split.is_pushed * publish,
            cta_split.pull_grad.seconds + cta_split.push_grad.seconds,
        )
    gemms, gate = layer.gemms(hardware.product_flops), layer.gate()
    forward = gate[0] + plan + moves + gemms[0] + launches + exchange + overlapped[0]
    dots = 2e-10 * layer.rows
    backward = gate[1] + dots + moves + gemms[1] + launches + exchange + overlapped[1]
    exposed = exchange + overlapped[0], exchange + overlapped[1]
    num_comm_ctas = () if is_alone else tuple(choice.num_comm_ctas for choice in cta_split)
    return "fused", num_comm_ctas, forward, backward, exposed


def _pipelined(
    layer: _Layer, num_chunks: int | None = None
) -> tuple[str, tuple[int, ...], float, float, tuple[float, float]]:
    cluster, hardware = layer.cluster, layer.hardware
    gemms, gate = layer.gemms(hardware.grouped_mm_flops), layer.gate()
    sizes = (layer.rows, layer.token_bytes, gemms, cluster.num_ranks, cluster.domain)
    chunked = ChunkedLayer(*sizes, cluster.nic_bytes_per_s, hardware)
    num_chunks = num_chunks or chunked.best()
    busy = chunked.seconds(num_chunks)
    # Rows are put into the order of their destinations, and there into that of the experts.
    moves = 6 * layer.row_bytes / hardware.memory_bytes_per_s
    forward, backward = (time + g + moves for time, g in zip(busy, gate, strict=True))
    on_device = chunked.device_seconds(num_chunks)
    exposed = on_device[0] - gemms[0], on_device[1] - gemms[1]
    return "pipelined", (num_chunks,), forward, backward, exposed


HEADER = (
    "layer             W  path       cta_split     limit fwd    f+b    fwd (x)      f+b (x)"
    "     exposed fwd    f+b ms"
)


def _line(name: str, num_ranks: int, r: Prediction) -> str:
    cta_split = "/".join(map(str, r.cta_split))
    ratios = r.forward_ms / r.limit_forward_ms, r.both_ms / r.limit_both_ms
    return (
        f"{name:14s} {num_ranks:4d}  {r.path:9s}  {cta_split:12s} "
        f"{r.limit_forward_ms:8.2f} "
        f"{r.limit_both_ms:6.2f} {r.forward_ms:8.2f} {ratios[0]:.2f} {r.both_ms:8.2f} "
        f"{ratios[1]:.2f} {r.exposed_forward_ms:10.2f} {r.exposed_both_ms:8.2f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("simulate", __doc__)
    add_shapes(parser)
    add_num_tokens(parser)
    parser.add_argument(
        "--ep-sizes",
        type=positive_ints,
        default="1,2,4,8,16,32,64,128",
        help="ranks of the expert parallel group, comma-separated (default: %(default)s)",
    )
    parser.add_argument(
        "--experts-per-rank",
        type=positive_int,
        help="experts of every rank, in place of the shape's experts of all ranks",
    )
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="every rank's GPU")
    parser.add_argument("--domain", type=positive_int, default=8, help="GPUs of an NVLink domain")
    parser.add_argument(
        "--nic-gbit", type=positive_float, default=400, help="network rate of a GPU, Gbit/s"
    )
    add_json(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and print a table."""
    parser = _parser()
    args = parser.parse_args(arguments)
    records = []
    print(HEADER)
    for name, shape in read_shapes(parser, args).items():
        for num_ranks in args.ep_sizes:
            if args.experts_per_rank is not None:
                num_experts = args.experts_per_rank * num_ranks
                if num_experts < shape.top_k:
                    print(f"{name:14s} {num_ranks:4d}  {num_experts} experts are fewer than top_k")
                    continue
                shape = replace(shape, num_experts=num_experts)
            if shape.num_experts % num_ranks:
                print(f"{name:14s} {num_ranks:4d}  no even spread of {shape.num_experts} experts")
                continue
            nic_bytes_per_s = args.nic_gbit * 1e9 / 8
            cluster = Cluster(num_ranks, args.domain, nic_bytes_per_s, GPUS[args.gpu])
            found = predict(shape, args.num_tokens, cluster)
            records.append({"shape": name, **asdict(shape), **asdict(cluster), **asdict(found)})
            print(_line(name, num_ranks, found))
    if args.json:
        args.json.write_text(json.dumps(records, indent=1))
