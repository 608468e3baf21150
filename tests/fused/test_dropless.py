# SPDX-License-Identifier: Apache-2.0
"""Without dropping, the fused path takes the memory that a routing needs, or what a bound allows.

tests/fused has the results of layers that drop nothing for every number of ranks; here it is their
memory, the bound, and CUDA graphs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.experts_zoo import GatedMLP
from helpers.parity import build, run
from helpers.virtual_ranks import VirtualGroup

from comet_ds import MoE
from comet_ds.fused.call import CallSizes, max_rows

TESTS = Path(__file__).parent.parent
HIDDEN, FFN, NUM_EXPERTS, TOP_K = 256, 384, 16, 4
BLOCK = 128


def test_a_bound_limits_the_rows() -> None:
    """Half more than the even share of 4 ranks is far less than all tokens of all ranks."""
    sizes = CallSizes((1000,) * 4, None, TOP_K, NUM_EXPERTS)
    bounded = CallSizes((1000,) * 4, None, TOP_K, NUM_EXPERTS, max_rows_factor=1.5)
    padding = 4 * (BLOCK - 1)
    assert max_rows(sizes, 4, BLOCK) == (16000 + padding) // BLOCK * BLOCK
    assert max_rows(bounded, 4, BLOCK) == (6000 + padding) // BLOCK * BLOCK


@pytest.mark.parametrize(
    ("num_tokens", "capacities", "factor", "expected"),
    [
        pytest.param((8, 8), None, None, True, id="nothing says how many"),
        pytest.param((8, 8), (4, 4), None, False, id="capacities bound them"),
        pytest.param((8, 8), None, 1.5, False, id="the user bounds them"),
        pytest.param((8,), None, None, False, id="all stay on the only rank"),
    ],
)
def test_rows_are_counted_where_sizes_leave_them_open(
    num_tokens: tuple[int, ...], capacities: Any, factor: float | None, expected: bool
) -> None:
    assert CallSizes(num_tokens, capacities, 2, 4, factor).counts_rows is expected


def options(**more: Any) -> dict[str, Any]:
    sizes = {"expert": GatedMLP(HIDDEN, FFN), "num_experts": NUM_EXPERTS, "k": TOP_K}
    return {**sizes, "dtype": torch.bfloat16, "drop_tokens": False, **more}


def draw(num_tokens: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(5)
    tensors = [torch.randn(2, n, HIDDEN, device="cuda", dtype=torch.bfloat16) for n in num_tokens]
    return [t[0].abs() for t in tensors], [t[1] for t in tensors]


def route_to_first(layer: Any, num_experts: int) -> None:
    """Make a gate send tokens without negative elements to the first experts alone."""
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.fill_(-1.0)
        layer.deepspeed_moe.gate.wg.weight[:num_experts].fill_(1.0)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_memory_is_that_of_the_rows_a_rank_has(num_ranks: int) -> None:
    """All ranks together hold each route once, wherever it goes, not once for every rank."""
    num_tokens = 512
    xs, grads = draw([num_tokens] * num_ranks)
    group = VirtualGroup(num_ranks, **options())
    routes = num_ranks * num_tokens * TOP_K
    padding = NUM_EXPERTS * BLOCK
    row_bytes = 2 * (HIDDEN + 2 * FFN)  # the dispatched row and two pre-activations
    for skewed in (False, True):
        if skewed:
            for layer in group.layers:
                route_to_first(layer, TOP_K)
        group.run(xs, grads)
        inputs = [x.clone().requires_grad_() for x in xs]
        before = torch.cuda.memory_allocated()
        outputs = group.forward(inputs)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        plan_bytes = num_ranks * (routes * 40 + padding * 40)
        most = 1.07 * (routes + padding) * row_bytes + plan_bytes + num_ranks * 2**20
        assert held < most, f"skewed {skewed}: {held} bytes, at most {most:.0f}"
        del outputs, inputs


@pytest.mark.gpu(1)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_bound_changes_no_bit(num_ranks: int) -> None:
    xs, grads = draw([300, 129, 0, 64][:num_ranks])
    counted = VirtualGroup(num_ranks, **options()).run(xs, grads)
    group = VirtualGroup(num_ranks, **options(comet_ds={"max_rows_factor": num_ranks}))
    for ours, theirs in zip(group.run(xs, grads), counted, strict=True):
        for what, value in theirs.items():
            assert torch.equal(ours[what], value), what


@pytest.mark.gpu(1)
def test_more_rows_than_the_bound_are_an_error_that_names_rank_and_key() -> None:
    """In a process of its own, whose GPU context does not survive the error."""
    script = f"""
import sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / "fused")!r}]
import torch
from test_dropless import TOP_K, draw, options, route_to_first
from helpers.virtual_ranks import VirtualGroup
xs, grads = draw([512, 512])
group = VirtualGroup(2, **options(comet_ds={{"max_rows_factor": 1.25}}))
group.run(xs, grads)  # an even routing fits
print("fits", flush=True)
for layer in group.layers:
    route_to_first(layer, TOP_K)
group.forward(xs)
torch.cuda.synchronize()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0 and "fits" in done.stdout, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert 'rank 0 of the expert parallel group has 4096 rows, "max_rows_factor" leaves' in said


def check_graphs(rank: int, size: int) -> None:
    xs, grads = draw([256] * size)
    parallel = {"ep_size": size, "parallel": True, "device": "cuda"}
    counting = build(MoE, rank, comet_ds={"path": "fused"}, **parallel, **options())
    expected = run(counting, xs[rank], grads[rank])
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(ValueError, match=r'give a bound, "max_rows_factor"'),
        torch.cuda.graph(graph),
    ):
        counting(xs[rank])
    torch.cuda.synchronize()
    block = {"path": "fused", "max_rows_factor": 2.0}
    layer = build(MoE, rank, comet_ds=block, **parallel, **options())
    x, grad = torch.empty_like(xs[rank]).normal_().abs_().requires_grad_(), grads[rank].clone()

    def step() -> torch.Tensor:
        output, l_aux, _ = layer(x)
        torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
        return output

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
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
    x.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, expected["output"])
    assert torch.equal(x.grad, expected["grad of x"])


@pytest.mark.gpu(2)
def test_graphs_need_a_bound(world) -> None:
    world(2, "nccl").run(check_graphs)


def check_many_steps(rank: int, size: int, num_steps: int) -> int:
    """Train with a routing that changes in every step; return how much reserved memory grew."""
    parallel = {"ep_size": size, "parallel": True, "device": "cuda"}
    layer = build(MoE, rank, **parallel, **options())
    generator = torch.Generator(device="cuda").manual_seed(rank)
    spread = torch.linspace(-1, 1, NUM_EXPERTS, device="cuda")
    reserved, paths = [], set()
    for step in range(num_steps):
        with torch.no_grad():  # from even to so skewed that one rank has nearly all tokens
            strength = 0.02 * abs((step % 100) - 50) / 50
            order = torch.roll(spread, step // 7)
            layer.deepspeed_moe.gate.wg.weight[:, 0] = (strength * 40 * order).bfloat16()
        x = torch.randn(2048, HIDDEN, device="cuda", generator=generator).bfloat16()
        x[:, 0] = 1
        output, l_aux, _ = layer(x.requires_grad_())
        (output.float().square().mean() + l_aux).backward()
        layer.zero_grad(set_to_none=True)
        paths.add(layer.deepspeed_moe.path)
        if step % 50 == 49:
            torch.cuda.synchronize()
            reserved.append(torch.cuda.memory_reserved())
    assert paths == {"fused"}
    return reserved[-1] - reserved[len(reserved) // 4]


@pytest.mark.gpu(2)
def test_memory_stays_flat_while_the_routing_changes(world) -> None:
    for growth in world(2, "nccl").run(check_many_steps, 1000):
        assert growth == 0, f"reserved memory grew by {growth} bytes after the first 250 steps"
