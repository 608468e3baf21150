# SPDX-License-Identifier: Apache-2.0
"""The layer in plain PyTorch: specification and test oracle.

    output[t] = sum over kept routes (t, k) of topk_weights[t, k] * expert[topk_ids[t, k]](x[t])

Products and sum are fp32 (fp64 for fp64 experts), rounded once to the experts' output dtype. With
expert parallelism every rank sees all tokens of its EP group, computes the share of its own
experts, and the shares are summed. Nothing here is fast; everything else is tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor, nn

from comet_ds.expert_calls import run_container, run_expert


def reference_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: Sequence[nn.Module],
    *,
    first_expert: int = 0,
) -> tuple[Tensor, torch.dtype]:
    """Compute what a contiguous range of experts contributes to every token.

    Args:
        x: [T, H].
        topk_ids: [T, K] int64, -1 = dropped.
        topk_weights: [T, K] fp32.
        experts: the range's modules, each [..., H] -> [..., H].
        first_expert: global index of the first of them.

    Returns:
        [T, H] in the combine's dtype (fp32, or fp64 for fp64 experts): the weighted sum, zero
        for tokens none of the experts was chosen for; and the dtype of the experts' output.
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
    return output, rows.dtype


def reference_container(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    container: nn.Module,
    experts: range,
    ep_size: int,
) -> tuple[Tensor, torch.dtype]:
    """Compute the same as ``reference_moe`` by a module that takes all local experts' rows.

    Args:
        x, topk_ids, topk_weights: T is that of one rank times ``ep_size``, rank-major.
        container: see ``run_container``.
        experts: global indices of the local experts.
        ep_size: W.
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
    ep_group: Any,
    ep_size: int,
    num_tokens: list[int],
    num_local_experts: int = 0,
    container: nn.Module | None = None,
) -> Tensor:
    """Compute the layer's output for this rank's tokens.

    Args:
        x, topk_ids, topk_weights: as in ``reference_moe``, this rank's tokens.
        experts: this rank's experts.
        ep_group: expert parallel group; not used when ep_size is 1.
        ep_size: its number of ranks.
        num_tokens: tokens on each rank of the group; they may differ.
        num_local_experts: El, where ``container`` is given.
        container: a module that is called in place of the experts, see ``run_container``.

    Returns:
        [T, H] in the dtype of the experts' output. Collective over ``ep_group``, forward and
        backward.
    """
    if ep_size == 1:
        if container is not None:
            own = range(num_local_experts)
            total, dtype = reference_container(x, topk_ids, topk_weights, container, own, 1)
        else:
            total, dtype = reference_moe(x, topk_ids, topk_weights, experts)
        return total.to(dtype)
    most = max(num_tokens)
    gathered = [_AllGather.apply(_pad(t, most), ep_group, ep_size) for t in (x, topk_weights)]
    ids = _all_gather(_pad(topk_ids, most, value=-1), ep_group, ep_size)
    rank = dist.get_rank(group=ep_group)
    if container is not None:
        own = range(rank * num_local_experts, (rank + 1) * num_local_experts)
        share, dtype = reference_container(gathered[0], ids, gathered[1], container, own, ep_size)
    else:
        share, dtype = reference_moe(
            gathered[0], ids, gathered[1], experts, first_expert=rank * len(experts)
        )
    total = _SumOwn.apply(share, ep_group, ep_size)
    return total[: x.shape[0]].to(dtype)


class _AllGather(torch.autograd.Function):
    """[n, ...] on every rank to [W * n, ...]; the gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _all_gather(rows, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_own(grad, ctx.group, ctx.size), None, None


class _SumOwn(torch.autograd.Function):
    """[W * n, ...] summed over the ranks, each keeping its own [n, ...]; adjoint of the above."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _sum_own(rows, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.group, ctx.size), None, None


def _all_gather(rows: Tensor, group: Any, size: int) -> Tensor:
    gathered = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    return gathered


def _sum_own(rows: Tensor, group: Any, size: int) -> Tensor:
    total = rows.clone()
    dist.all_reduce(total, group=group)
    own = rows.shape[0] // size
    return total.narrow(0, dist.get_rank(group=group) * own, own)


def _pad(rows: Tensor, length: int, value: float = 0) -> Tensor:
    return F.pad(rows, (0, 0, 0, length - rows.shape[0]), value=value)
