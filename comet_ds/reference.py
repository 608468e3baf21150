# SPDX-License-Identifier: Apache-2.0
"""The layer in plain PyTorch: specification and test oracle.

    output[t] = sum over kept routes (t, k) of topk_weights[t, k] * expert[topk_ids[t, k]](x[t])

Products and sum are fp32 (fp64 for fp64 experts), rounded once to the experts' output dtype. With
expert parallelism every rank gathers all tokens of its group, computes the share of its own
experts, and the shares are summed. It is slow; all other paths are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor, nn

from comet_ds.experts.calls import run_container, run_expert
from comet_ds.pipelined.counts import CountExchange
from comet_ds.ranks.gradients import anchor
from comet_ds.ranks.waiting import BACKWARD, FORWARD


def reference_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: Sequence[nn.Module],
    *,
    first_expert: int = 0,
) -> tuple[Tensor, torch.dtype]:
    """Compute the share of a contiguous range of experts in every token's output.

    Args:
        x: [T, H].
        topk_ids: [T, K] int64, -1 = dropped.
        topk_weights: [T, K] fp32.
        experts: the range's modules, each [..., H] -> [..., H].
        first_expert: global index of ``experts[0]``.

    Returns:
        The weighted sum [T, H] in fp32 (fp64 for fp64 experts), zero for a token that no expert of
        the range was chosen for; and the dtype of the experts' output.
    """
    output = None
    for expert_id, expert in enumerate(experts, start=first_expert):
        token, route = torch.nonzero(topk_ids == expert_id, as_tuple=True)
        rows = run_expert(expert, x[token])
        weights = topk_weights[token, route].unsqueeze(1)
        share = weights * rows.to(torch.promote_types(rows.dtype, weights.dtype))
        if output is None:
            output = torch.zeros(x.shape, dtype=share.dtype, device=x.device)
        output = output.index_add(0, token, share)
    assert output is not None, "a rank has at least one expert"
    return output, rows.dtype


def reference_container(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    container: nn.Module,
    experts: range,
    ep_size: int,
) -> tuple[Tensor, torch.dtype]:
    """Compute the same as ``reference_moe`` with one call of a user's container of experts.

    Args:
        x, topk_ids, topk_weights: as in ``reference_moe``; the tokens of all ranks, rank-major,
            the same number of each.
        container: see ``run_container``.
        experts: global indices of the local experts.
        ep_size: number of ranks, W.

    Returns:
        As ``reference_moe``.
    """
    rank_of_token = torch.arange(x.shape[0], device=x.device) // max(x.shape[0] // ep_size, 1)
    routes, segments = [], []
    for rank in range(ep_size):
        for local, expert_id in enumerate(experts):
            is_here = (topk_ids == expert_id) & (rank_of_token == rank).unsqueeze(1)
            routes.append(torch.nonzero(is_here))
            segments.append((rank, local, routes[-1].shape[0]))
    token, route = torch.cat(routes).unbind(dim=1)
    rows = run_container(container, x[token], segments, ep_size, len(experts))
    weights = topk_weights[token, route].unsqueeze(1)
    share = weights * rows.to(torch.promote_types(rows.dtype, weights.dtype))
    output = torch.zeros(x.shape, dtype=share.dtype, device=x.device)
    return output.index_add(0, token, share), rows.dtype


def reference_forward(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: Sequence[nn.Module],
    *,
    exchange: CountExchange | None,
    num_local_experts: int = 0,
    container: nn.Module | None = None,
) -> Tensor:
    """Compute the layer's output for this rank's tokens.

    Args:
        x, topk_ids, topk_weights: as in ``reference_moe``; this rank's tokens.
        experts: this rank's experts.
        exchange: the started exchange of the ranks' numbers of tokens, which may differ; None
            without expert parallelism.
        num_local_experts: number of experts of a rank; read with ``container`` only.
        container: a module that is called in place of the experts, see ``run_container``.

    Returns:
        [T, H] in the dtype of the experts' output; can be differentiated any number of times.
        Forward and backward are collective over the group.
    """
    if exchange is None:
        if container is not None:
            own = range(num_local_experts)
            total, dtype = reference_container(x, topk_ids, topk_weights, container, own, 1)
        else:
            total, dtype = reference_moe(x, topk_ids, topk_weights, experts)
        return total.to(dtype)
    most = int(exchange.wait()[0].max())
    has_backward = torch.is_grad_enabled() and exchange.needs.has_any
    parts = _pad(x, most), _pad(topk_weights, most)
    rows, weights, edge = _AllGather.apply(exchange, FORWARD, anchor(x, has_backward), *parts)
    ids = _all_gather(_pad(topk_ids, most, value=-1), exchange, FORWARD)
    if container is not None:
        first_expert = exchange.rank * num_local_experts
        own = range(first_expert, first_expert + num_local_experts)
        share, dtype = reference_container(rows, ids, weights, container, own, exchange.ep_size)
    else:
        first_expert = exchange.rank * len(experts)
        share, dtype = reference_moe(rows, ids, weights, experts, first_expert=first_expert)
    total, _ = _SumOwn.apply(exchange, FORWARD, edge, share)
    return total[: x.shape[0]].to(dtype)


class _AllGather(torch.autograd.Function):
    """[n, ...] on every rank to [W * n, ...]; the gradient is summed over the ranks.

    This function and ``_SumOwn`` take an edge (an empty tensor) and any number of tensors, and
    return as many tensors and an edge for the next function. The edges keep all ranks' graphs the
    same even if an expert detaches its output. The first edge is an anchor, a leaf.
    """

    @staticmethod
    def forward(
        ctx: Any, exchange: CountExchange, part: str, edge: Tensor, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.has_anchor = exchange, edge.is_leaf
        return *(_all_gather(r, exchange, part) for r in rows), edge.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *rows, edge = grads
        *sums, edge = _SumOwn.apply(ctx.exchange, BACKWARD, _attached(edge), *rows)
        return None, None, None if ctx.has_anchor else edge, *sums


class _SumOwn(torch.autograd.Function):
    """Sum [W * n, ...] over the ranks and keep this rank's [n, ...]; adjoint of ``_AllGather``."""

    @staticmethod
    def forward(
        ctx: Any, exchange: CountExchange, part: str, edge: Tensor, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.has_anchor = exchange, edge.is_leaf
        return *(_sum_own(r, exchange, part) for r in rows), edge.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.needs.check_present()
        *rows, edge = grads
        *gathered, edge = _AllGather.apply(ctx.exchange, BACKWARD, _attached(edge), *rows)
        return None, None, None if ctx.has_anchor else edge, *gathered


def _attached(edge: Tensor) -> Tensor:
    """Return an edge's gradient, or an anchor in its place if it must be differentiated again."""
    return anchor(edge) if torch.is_grad_enabled() and not edge.requires_grad else edge


def _all_gather(rows: Tensor, exchange: CountExchange, part: str) -> Tensor:
    rows = rows.contiguous()
    gathered = rows.new_empty(exchange.ep_size * rows.shape[0], *rows.shape[1:])
    work = dist.all_gather_into_tensor(gathered, rows, group=exchange.group, async_op=True)
    exchange.attendance.finish(work, gathered, f"{part} {exchange.what}")
    return gathered


def _sum_own(rows: Tensor, exchange: CountExchange, part: str) -> Tensor:
    total = rows.clone()
    work = dist.all_reduce(total, group=exchange.group, async_op=True)
    exchange.attendance.finish(work, total, f"{part} {exchange.what}")
    own = rows.shape[0] // exchange.ep_size
    return total.narrow(0, exchange.rank * own, own)


def _pad(rows: Tensor, length: int, value: float = 0) -> Tensor:
    return F.pad(rows, (0, 0, 0, length - rows.shape[0]), value=value)
