# SPDX-License-Identifier: Apache-2.0
"""Row order: worked examples by hand, then properties on random routings."""

from __future__ import annotations

import pytest
import torch

from comet_ds.pipelined.plan import ChunkSchedule, expert_major_order, plan_routes


def test_worked_example() -> None:
    """The one in the module's docstring."""
    schedule = ChunkSchedule(ep_size=2, num_local_experts=2, num_chunks=2)
    assert schedule.segment_of_expert.tolist() == [[0, 2, 1, 3]]
    assert [(list(c.experts), c.first_segment) for c in schedule.chunks] == [([0], 0), ([1], 2)]
    plan = plan_routes(torch.tensor([[3], [0], [2]]), schedule.segment_of_expert)
    assert plan.row_of_route.tolist() == [[2], [0], [1]]
    assert plan.token_of_row.tolist() == [1, 2, 0]
    assert plan.tokens_per_segment.tolist() == [1, 1, 0, 1]


def test_dropped_routes_come_last() -> None:
    schedule = ChunkSchedule(1, 2, 1)
    plan = plan_routes(torch.tensor([[-1, 1], [0, -1], [1, 0]]), schedule.segment_of_expert)
    assert plan.row_of_route.tolist() == [[-1, 2], [0, -1], [3, 1]]
    assert plan.token_of_row[:4].tolist() == [1, 2, 0, 2]
    assert plan.tokens_per_segment.tolist() == [2, 2]


def test_one_expert_a_rank_is_cut_by_tokens() -> None:
    """Two ranks with one expert each: a chunk is half of the tokens."""
    schedule = ChunkSchedule(ep_size=2, num_local_experts=1, num_chunks=2)
    assert schedule.num_token_parts == 2
    plan = plan_routes(torch.tensor([[1], [0], [0], [1]]), schedule.segment_of_expert)
    assert plan.tokens_per_segment.tolist() == [1, 1, 1, 1]
    assert plan.token_of_row.tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize(
    ("ep_size", "num_local_experts", "num_chunks"),
    [(1, 8, 1), (2, 4, 1), (2, 4, 3), (2, 5, 4), (4, 1, 3), (2, 3, 4), (8, 16, 2)],
    ids=[
        "one rank",
        "one chunk",
        "chunks of unequal size",
        "experts no multiple of chunks",
        "one expert a rank, cut by tokens",
        "more chunks than experts",
        "many ranks and experts",
    ],
)
@pytest.mark.parametrize(
    ("num_tokens", "top_k"),
    [(0, 2), (1, 1), (63, 3), (129, 1)],
    ids=["no tokens", "one token", "several routes", "one route"],
)
def test_rows_are_grouped_by_segment(
    ep_size: int, num_local_experts: int, num_chunks: int, num_tokens: int, top_k: int
) -> None:
    torch.manual_seed(0)
    schedule = ChunkSchedule(ep_size, num_local_experts, num_chunks)
    num_experts = ep_size * num_local_experts
    topk_ids = torch.randint(-1, num_experts, (num_tokens, top_k))
    plan = plan_routes(topk_ids, schedule.segment_of_expert)
    # The order, spelled out: chunk, destination rank, local expert, token.
    expected, counts = [], []
    for index, chunk in enumerate(schedule.chunks):
        part = index % schedule.num_token_parts
        for rank in range(ep_size):
            for local in chunk.experts:
                rows = [
                    (t, k)
                    for t in range(num_tokens)
                    for k in range(top_k)
                    if topk_ids[t, k] == rank * num_local_experts + local
                    and t * schedule.num_token_parts // num_tokens == part
                ]
                expected += rows
                counts.append(len(rows))
    assert plan.tokens_per_segment.tolist() == counts
    assert plan.token_of_row[: len(expected)].tolist() == [t for t, _ in expected]
    for row, (t, k) in enumerate(expected):
        assert plan.row_of_route[t, k] == row
    assert (plan.row_of_route < 0).sum() == num_tokens * top_k - len(expected)


def test_schedule_covers_every_expert_once() -> None:
    for num_local_experts in range(1, 9):
        for num_chunks in range(1, 12):
            schedule = ChunkSchedule(3, num_local_experts, num_chunks)
            assert len(schedule.chunks) >= num_chunks
            seen = [e for g in schedule.expert_groups for e in g]
            assert seen == list(range(num_local_experts))
            table = schedule.segment_of_expert.flatten().sort().values
            assert table.tolist() == list(range(schedule.num_segments))


def test_expert_major_order() -> None:
    order, inverse, offsets = expert_major_order(torch.tensor([[1, 2], [1, 0]]), 4)
    assert order.tolist() == [0, 3, 1, 2]
    assert offsets.tolist() == [2, 4] and offsets.dtype == torch.int32
    assert inverse[order].tolist() == [0, 1, 2, 3]
    counts = torch.randint(0, 4, (3, 5))
    labels = [(e, r) for r in range(3) for e in range(5) for _ in range(counts[r, e])]
    order, _, offsets = expert_major_order(counts, len(labels))
    assert [labels[i] for i in order] == sorted(labels)
    assert offsets.tolist() == counts.sum(dim=0).cumsum(0).tolist()


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    ("num_tokens", "top_k"),
    [(0, 2), (1, 1), (63, 3), (129, 8), (8192, 4)],
    ids=["no tokens", "one token", "several routes", "many routes", "many blocks"],
)
@pytest.mark.parametrize(
    ("ep_size", "num_local_experts", "num_chunks"),
    [(1, 8, 1), (2, 5, 4), (4, 1, 3), (8, 128, 2)],
    ids=["one rank", "uneven chunks", "one expert a rank", "many segments"],
)
def test_plan_kernels(num_tokens, top_k, ep_size, num_local_experts, num_chunks) -> None:
    """The kernels give what the PyTorch version gives on the CPU, entry for entry."""
    torch.manual_seed(0)
    table = ChunkSchedule(ep_size, num_local_experts, num_chunks).segment_of_expert
    ids = torch.randint(-1, ep_size * num_local_experts, (num_tokens, top_k))
    expected, got = plan_routes(ids, table), plan_routes(ids.cuda(), table.cuda())
    kept = (ids >= 0).sum()
    assert torch.equal(got.row_of_route.cpu(), expected.row_of_route)
    assert torch.equal(got.tokens_per_segment.cpu(), expected.tokens_per_segment)
    assert torch.equal(got.token_of_row[:kept].cpu(), expected.token_of_row[:kept])
    dropped = [t.token_of_row[kept:].cpu().sort().values for t in (got, expected)]
    assert torch.equal(*dropped)


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (2, 16), (3, 5), (8, 128)],
    ids=["one rank and expert", "a warp of counts", "less than a warp", "many counts"],
)
@pytest.mark.parametrize("most", [0, 1, 3, 400])
def test_arrival_kernel(shape: tuple[int, int], most: int) -> None:
    """Ranks and experts, and at most so many rows of each: also none at all."""
    torch.manual_seed(0)
    padded = torch.randint(0, most + 1, (shape[0], shape[1] + 2))
    counts, num_rows = padded[:, 2:], int(padded[:, 2:].sum())
    expected = expert_major_order(counts, num_rows)
    got = expert_major_order(padded.cuda()[:, 2:], num_rows)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs) and mine.dtype == theirs.dtype
