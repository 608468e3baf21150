# SPDX-License-Identifier: Apache-2.0
"""Which rows the fused path gives to routes: how many at most, where each lies, in which order.

The plan is checked against what its comment in csrc/rows/dispatch.h promises, from random routings.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from comet_ds.fused.call import CallSizes, max_rows, plan_of
from comet_ds.fused.peer.layout import TABLES
from comet_ds.kernels import load_kernels


@pytest.mark.parametrize("num_experts", [1, 4, 8])
@pytest.mark.parametrize("capacity", [None, 5, 40, 1000])
def test_max_rows(num_experts: int, capacity: int | None) -> None:
    """No routing needs more rows, and the bound is a number of blocks."""
    generator = torch.Generator().manual_seed(3)
    for top_k in (1, 2, 3):
        num_tokens = (37, 0, 260)
        capacities = None if capacity is None else (capacity,) * 3
        sizes = CallSizes(num_tokens, capacities, top_k, 3 * num_experts)
        bound = max_rows(sizes, num_experts, 128)
        assert bound % 128 == 0 and bound > 0
        for skew in (0.0, 5.0):
            rows = torch.zeros(num_experts, dtype=torch.int64)
            for count in num_tokens:
                scores = torch.rand(count, num_experts, generator=generator)
                scores[:, 0] += skew
                chosen = scores.topk(min(top_k, num_experts), dim=1).indices
                counts = torch.bincount(chosen.flatten(), minlength=num_experts)
                rows += counts if capacity is None else counts.clamp(max=capacity)
            assert ((rows + 127) // 128 * 128).sum() <= bound


@dataclass(frozen=True)
class Planned:
    """A plan that rank 0's kernel has made.

    Attributes:
        plan: its parts by name: RowPlan of csrc/rows/dispatch.h.
        offsets: [E + 1] first row of each expert.
        counts: [W, E] routes of every rank's tokens to each expert.
        tokens: [T, 72] of rank 0.
        rows: [R, 72], where they were placed.
        block: rows of a block.
    """

    plan: SimpleNamespace
    offsets: list[int]
    counts: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor
    block: int


def draw_routing(num_ranks: int, num_experts: int, top_k: int) -> list[tuple[torch.Tensor, ...]]:
    """Return every rank's tables, in the order of ``TABLES``; a rank has 300 tokens more a rank."""
    torch.manual_seed(2)
    tables = []
    for rank in range(num_ranks):
        ids = torch.randint(-1, num_experts, (700 + 300 * rank, top_k), device="cuda")
        is_routed = F.one_hot(ids.flatten() + 1, num_experts + 1)
        slots = (is_routed.cumsum(0) - 1).gather(1, ids.flatten()[:, None] + 1)
        weights, counts = torch.rand(ids.shape, device="cuda"), is_routed.sum(0)[1:].int()
        tables.append((ids, weights, slots.int().view_as(ids), counts))
    return tables


def make_plan(num_ranks: int, num_split: int, num_local: int, top_k: int) -> Planned:
    """Have rank 0 plan the rows of its experts, some of which are split by where tokens are."""
    kernels = load_kernels(torch.device("cuda", 0))
    num_experts, split = num_local * num_ranks, [2, num_split]
    tables = draw_routing(num_ranks, num_experts, top_k)
    num_tokens = [table[0].shape[0] for table in tables]
    tokens = torch.randn(num_tokens[0], 72, dtype=torch.bfloat16, device="cuda")
    sizes = CallSizes(tuple(num_tokens), None, top_k, num_experts)
    size = max_rows(sizes, num_local, kernels.row_block)
    # Of rank 0's, the tables are the call's own.
    sources = [
        (*(t.data_ptr() * (rank > 0) for t in tb), 0, 0, 0) for rank, tb in enumerate(tables)
    ]
    call = kernels.LayerCall(
        hidden=72,
        ffn=8,
        num_experts=num_local,
        num_all_experts=num_experts,
        top_k=top_k,
        max_rows=size,
        counts_rows=False,
        num_tokens=num_tokens,
        rank=0,
        num_sms=132,
        is_bfloat16=True,
        is_gated=False,
        activation=0,
        maps=[0, 0, 0],
        biases=[0, 0, 0],
        **dict.fromkeys(("pull", "push", "pull_grad", "push_grad"), split),
        sources=sources,
    )
    workspace = torch.full((call.workspace_bytes,), 1, dtype=torch.uint8, device="cuda")
    rows = torch.full((size, 72), torch.nan, dtype=tokens.dtype, device="cuda")
    call.forward(
        tokens=tokens,
        **dict(zip(TABLES, tables[0], strict=True)),
        workspace=workspace,
        rows=rows,
        hidden=torch.empty(size, 8, dtype=tokens.dtype, device="cuda"),
        pre=(),
        results=torch.empty_like(rows),
        output=torch.empty_like(tokens),
        part="plan",
    )
    plan = SimpleNamespace(**plan_of(call, workspace))
    counts = torch.stack([table[-1] for table in tables])[:, :num_local].cpu()
    offsets = plan.expert_offsets.tolist()
    return Planned(plan, offsets, counts, tokens, rows, kernels.row_block)


# Ranks, experts that are split by where tokens are, experts of a rank, k.
PLANS: dict[str, tuple[int, int, int, int]] = {
    **{
        f"{num_ranks} rank(s), {what} split": (num_ranks, num_split, 12, 3)
        for num_ranks in (1, 2, 4)
        for num_split, what in ((0, "none"), (5, "some"), (12, "all"))
    },
    "more experts than a block has threads": (1, 0, 300, 3),
    "more routes than a warp has lanes": (2, 7, 40, 34),
}


@pytest.mark.gpu(1)
@pytest.mark.parametrize("sizes", PLANS.values(), ids=PLANS)
def test_own_tokens_lie_in_their_rows(sizes: tuple[int, int, int, int]) -> None:
    """Rows of padding are zero, counters are reset, other ranks' rows are not looked at."""
    found = make_plan(*sizes)
    plan, end = found.plan, found.offsets[-1]
    is_padding = plan.token_of_row[:end] < 0
    assert is_padding.any() and not found.rows[:end][is_padding].any()
    row_of_route = plan.row_of_route[: found.tokens.shape[0]]
    token, _ = (has_row := row_of_route >= 0).nonzero(as_tuple=True)
    assert has_row.any() and torch.equal(found.rows[row_of_route[has_row]], found.tokens[token])
    assert not plan.counters.any()


def distances_of(found: Planned, order: list[int], experts: list[int]) -> list[int]:
    """Return the ring distance of the farthest rank with rows in each block of an order."""
    held = found.counts.cumsum(0)  # of an expert's rows, own ones first, then by ring distance
    distances = []
    for block, expert in zip(order, experts, strict=True):
        begin = block * found.block - found.offsets[expert]
        assert 0 <= begin < found.offsets[expert + 1] - found.offsets[expert]
        last = min(begin + found.block, int(held[-1, expert]))
        distances.append(int((held[:, expert] < last).sum()))
    return distances


@pytest.mark.gpu(1)
@pytest.mark.parametrize("sizes", PLANS.values(), ids=PLANS)
def test_order_of_blocks(sizes: tuple[int, int, int, int]) -> None:
    """Every block once; of split experts those with own tokens alone first, then unsplit experts',
    then the rest; an expert's in pairs where they can be."""
    _, num_split, num_local, _ = sizes
    found, order_idx = make_plan(*sizes), 1  # order 0 splits nothing
    plan, num_blocks = found.plan, found.offsets[-1] // found.block
    order, experts = (
        t[order_idx, :num_blocks].tolist() for t in (plan.block_order, plan.expert_order)
    )
    assert sorted(order) == list(range(num_blocks))
    distances = distances_of(found, order, experts)
    has_remote = [int(plan.remote_rows[block]) > 0 for block in order]
    assert has_remote == [distance > 0 for distance in distances]
    if num_split == num_local:
        phases = distances
    else:
        halves = zip(experts, distances, strict=True)
        phases = [1 if e >= num_split else 2 * (distance > 0) for e, distance in halves]
    pairs = list(zip(experts[::2], experts[1::2], strict=False))
    in_order = [phases[2 * i] for i, (a, b) in enumerate(pairs) if a == b]
    assert in_order == sorted(in_order)
    segments = Counter(zip(phases, experts, strict=True))
    num_mixed = sum(a != b for a, b in pairs)
    assert num_mixed <= sum(size % 2 for size in segments.values()) / 2
    own, *begins = plan.remote_begin[order_idx].tolist()
    assert own == 0
    for distance, begin in enumerate(begins, 1):
        # As late as it can be in pairs: behind it come those of unsplit experts too.
        assert begin % 2 == 0 and all(d < distance for d in distances[:begin])
        first = distance if num_split == num_local else 1
        assert begin == sum(phase < first for phase in phases) // 2 * 2
