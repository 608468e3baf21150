# SPDX-License-Identifier: Apache-2.0
"""Two GPUs, a rank each: the fused path over real links, in every situation a training run has.

Sizes and routing that change, memory that grows, frozen experts, recomputed forwards, CUDA graphs,
CTA splits that are measured meanwhile, groups side by side, bad inputs, and a rank that is killed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.distributed import assert_killed_rank_is_named
from helpers.mlp_forms import BF16
from helpers.parity import build, named_grads, oracle, run
from helpers.peer_layers import (
    SHAPES,
    all_experts,
    build_pinned,
    draw_cases,
    options_for,
    run_deepspeed,
)
from helpers.tolerance import assert_as_accurate, assert_close
from helpers.virtual_ranks import both_ways
from torch.utils.checkpoint import checkpoint

from comet_ds import MoE
from comet_ds.fused.peer.connect import exchange_of
from comet_ds.tuning.online import FINAL_SAMPLES, SAMPLES, WARM_UP
from comet_ds.tuning.table import read


def check_two_ranks(rank: int, size: int, num_tokens: list[int], shape: tuple[int, ...]) -> None:
    """As close to fp64 as DeepSpeed's layer; the fused path runs, and repeats itself."""
    options = options_for(shape, "swiglu", BF16) | {"top2_2nd_expert_sampling": False}
    block = {"path": "fused", "exact_gate": True}
    parallel = dict(ep_size=size, parallel=True, device="cuda")
    layer = build(MoE, rank, comet_ds=block, **parallel, **options)
    xs, grads = draw_cases(num_tokens, shape[2], BF16)
    got = run(layer, xs[rank], grads[rank])
    assert layer.deepspeed_moe.path == "fused"
    exchange = exchange_of(layer.deepspeed_moe.ep_group)
    for cta_split in (None, *both_ways(layer.deepspeed_moe.fused.cta_split)):
        exchange.policy.pinned = cta_split
        again = run(layer, xs[rank], grads[rank])
        assert all(torch.equal(again[what], value) for what, value in got.items()), f"{cta_split}"
    exchange.policy.pinned = None
    truth = oracle(layer, xs[rank], grads[rank], all_experts(shape, "swiglu", BF16))
    if num_tokens[rank] > 0:
        theirs = run_deepspeed(xs[rank], grads[rank], options)
        for what in ("output", "grad of x"):
            assert_as_accurate(got[what], theirs[what], truth[what], f"{num_tokens}: {what}")
    other = build(MoE, rank, comet_ds={**block, "path": "pipelined"}, **parallel, **options)
    for what, value in run(other, xs[rank], grads[rank]).items():
        assert_close(got[what], value, f"{num_tokens}: {what}")


@pytest.mark.gpu(2)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_two_ranks_fused(world, shape: tuple[int, ...]) -> None:
    """Even and uneven numbers of tokens, one rank without any, both without."""
    for num_tokens in ([129, 129], [1, 300], [0, 63], [0, 0]):
        world(2, "nccl").run(check_two_ranks, num_tokens, shape)


def check_many_calls(rank: int, size: int) -> None:
    """A thousand calls of two layers with one memory: sizes, routing and how tokens come change,
    nothing waits."""
    layers = []
    for hidden in (64, 200):
        options = options_for((8, 4, hidden, 96), "swiglu", BF16) | {"drop_tokens": True}
        block = {"path": "fused"}
        layers.append(
            build(MoE, rank, ep_size=size, parallel=True, device="cuda", comet_ds=block, **options)
        )
    draws = [draw_cases([300 + 17 * (i + r) for r in range(size)], 200, BF16) for i in range(5)]
    results: dict[tuple[int, int], dict] = {}
    for step in range(500):
        xs, grads = draws[step % 5]
        for i, layer in enumerate(layers):
            width = (64, 200)[i]
            x, grad = (t[rank][:, :width].contiguous() for t in (xs, grads))
            if step == 10:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            result = run(layer, x, grad)
            exchange = exchange_of(layer.deepspeed_moe.ep_group)
            exchange.policy.pinned = both_ways(layer.deepspeed_moe.fused.cta_split)[step % 3 % 2]
            torch.cuda.set_sync_debug_mode("default")
            first = results.setdefault((step % 5, i), result)
            assert all(torch.equal(first[what], value) for what, value in result.items())


@pytest.mark.gpu(2)
def test_many_calls(world) -> None:
    world(2, "nccl").run(check_many_calls)


def check_growth(rank: int, size: int) -> None:
    """The group's memory grows between calls; what was right before is right after."""
    layer = build_pinned(rank, size, (8, 2, 1024, 128))
    small, large = (draw_cases([count] * size, 1024, BF16) for count in (64, 20000))
    first = run(layer, small[0][rank], small[1][rank])
    before = exchange_of(layer.deepspeed_moe.ep_group).memory.block.numel()
    run(layer, large[0][rank], large[1][rank])
    assert exchange_of(layer.deepspeed_moe.ep_group).memory.block.numel() > before
    again = run(layer, small[0][rank], small[1][rank])
    assert all(torch.equal(first[what], value) for what, value in again.items())


@pytest.mark.gpu(2)
def test_growing_memory(world) -> None:
    world(2, "nccl").run(check_growth)


def check_frozen_and_recomputed(rank: int, size: int) -> None:
    """Without gradients of experts, without any, and with forward run again in backward."""
    layer = build_pinned(rank, size)
    xs, grads = draw_cases([129] * size, 128, BF16)
    expected = run(layer, xs[rank], grads[rank])

    def grad_of_x(forward: Callable) -> torch.Tensor:
        layer.zero_grad()
        x = xs[rank].clone().requires_grad_()
        torch.manual_seed(7)
        output, l_aux, _ = forward(x)
        torch.autograd.backward([output, l_aux], [grads[rank], torch.ones_like(l_aux)])
        return x.grad

    for reentrant in (False, True):
        got = grad_of_x(lambda x, how=reentrant: checkpoint(layer, x, use_reentrant=how))
        assert torch.equal(got, expected["grad of x"]), f"checkpointed, {reentrant=}"
        for name, grad in named_grads(layer).items():
            assert torch.equal(grad, expected[name]), name
    layer.deepspeed_moe.experts.requires_grad_(False)
    assert torch.equal(grad_of_x(layer), expected["grad of x"])
    with torch.no_grad():
        assert torch.equal(layer(xs[rank])[0], expected["output"])


@pytest.mark.gpu(2)
def test_frozen_and_recomputed(world) -> None:
    world(2, "nccl").run(check_frozen_and_recomputed)


def check_graph(rank: int, size: int, way: int) -> None:
    """A captured forward and backward does on new input what the layer does."""
    layer = build_pinned(rank, size, drop_tokens=True, use_rts=False)
    xs, grads = draw_cases([256] * size, 128, BF16)
    x = torch.randn_like(xs[rank]).requires_grad_()
    grad = torch.randn_like(x)

    def step() -> torch.Tensor:
        output, l_aux, _ = layer(x)
        torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
        return output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        exchange = exchange_of(layer.deepspeed_moe.ep_group)
        exchange.policy.pinned = both_ways(layer.deepspeed_moe.fused.cta_split)[way]
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    x.grad = None
    layer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    with torch.no_grad():
        x.copy_(xs[rank])
        grad.copy_(grads[rank])
    for _ in range(3):
        x.grad.zero_()
        graph.replay()
    torch.cuda.synchronize()
    got = output.clone(), x.grad.clone()
    expected = run(layer, xs[rank], grads[rank])
    assert torch.equal(got[0], expected["output"])
    assert torch.equal(got[1], expected["grad of x"])


@pytest.mark.gpu(2)
@pytest.mark.parametrize("way", [0, 1], ids=["tokens pushed", "tokens pulled"])
def test_cuda_graph_between_ranks(world, way: int) -> None:
    world(2, "nccl").run(check_graph, way)


def check_refining(rank: int, size: int, folder: str) -> None:
    """A layer measures its CTA splits while it runs; its results are the same throughout."""
    path = Path(folder) / "table.json"
    block = {"path": "fused", "refine": True, "tuning_table": str(path)}
    layer = build_pinned(rank, size, (8, 2, 1024, 256), comet_ds=block)
    fused = layer.deepspeed_moe.fused
    xs, grads = draw_cases([1000] * size, 1024, BF16)
    first, cta_splits = run(layer, xs[rank], grads[rank]), set()
    for _ in range(WARM_UP + 20 * SAMPLES + 2 * FINAL_SAMPLES):
        again = run(layer, xs[rank], grads[rank])
        assert all(torch.equal(first[what], value) for what, value in again.items())
        cta_splits.add(fused.cta_split)
    (tuner,) = exchange_of(layer.deepspeed_moe.ep_group).policy._tuner._tuners.values()
    assert len(cta_splits) > 5 and fused.cta_split == tuner.best
    found: list = [None] * size
    points = [tuple(choice[:2]) for choice in fused.cta_split]
    torch.distributed.all_gather_object(found, points)
    assert found == [points] * size
    assert len(read(path)) == 1


@pytest.mark.gpu(2)
def test_refining(world, tmp_path: Path) -> None:
    world(2, "nccl").run(check_refining, str(tmp_path))


def check_groups(rank: int, size: int) -> None:
    """Two groups of two ranks side by side; each is as a world of its own."""
    shape = (8, 2, 128, 192)
    layer = build_pinned(rank, 2, shape)
    other = build_pinned(rank, 2, shape, comet_ds={"path": "pipelined"})
    xs, grads = draw_cases([129, 300, 63, 0], 128, BF16)
    for _ in range(3):
        got = run(layer, xs[rank], grads[rank])
    assert layer.deepspeed_moe.path == "fused"
    for what, value in run(other, xs[rank], grads[rank]).items():
        assert_close(got[what], value, what)


@pytest.mark.gpu(4)
def test_groups_side_by_side(world) -> None:
    world(4, "nccl").run(check_groups)


def check_bad_input(rank: int, size: int) -> str:
    options = options_for((8, 2, 64, 96), "swiglu", BF16)
    layer = build(
        MoE, rank, ep_size=size, parallel=True, device="cuda", comet_ds={"path": "fused"}, **options
    )
    x = torch.randn(8, 72 if rank else 64, device="cuda", dtype=BF16)
    try:
        layer(x)
    except ValueError as error:
        layer(torch.randn(8, 64, device="cuda", dtype=BF16))[0].sum().item()
        return str(error)
    return "no error"


@pytest.mark.gpu(2)
def test_bad_input_fused(world) -> None:
    for answer in world(2, "nccl").run(check_bad_input):
        assert "rank 1 of the expert parallel group" in answer
        assert "hidden size 64, got 72" in answer


def check_killed(rank: int, size: int) -> None:
    options = options_for((8, 2, 64, 96), "swiglu", BF16)
    block = {"path": "fused", "timeout_s": 4}
    layer = build(MoE, rank, ep_size=size, parallel=True, device="cuda", comet_ds=block, **options)
    x = torch.randn(64, 64, device="cuda", dtype=BF16)
    layer(x)[0].sum().item()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        layer(x)[0].sum().item()


@pytest.mark.gpu(2)
def test_killed_rank_is_named() -> None:
    assert_killed_rank_is_named(check_killed, "nccl")
