# SPDX-License-Identifier: Apache-2.0
"""Gradient norm and clipping of ZeRO 1 and 2, for models with stacked experts.

DeepSpeed computes the norm of a group from fp64 copies, four times the size of bf16 gradients, and
waits for the GPU once per group for the norm and once more before clipping. With stacked experts,
where one stack can fill a group, this takes more than a tenth of a step. Here squares are summed in
fp64 without a copy, one all-reduce serves all groups, and the clipping factor is computed once per
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import Tensor, nn

from comet_ds._compat.deepspeed import ZeroOptimizer
from comet_ds._compat.torch import multiply_, norms_of


def install_norm(optimizer: ZeroOptimizer) -> None:
    """Replace an optimizer's norm and clipping; results differ by fp64 rounding at most."""
    optimizer.scaled_global_norm = _NormOfAllGroups(optimizer)
    optimizer._average_expert_grad_norms = _AverageOfExpertNorms(optimizer)
    optimizer.unscale_and_clip_grads = _ClipByOneFactor(optimizer)


def is_counted(tagged: Tensor, is_first_rank: bool) -> bool:
    """Return whether DeepSpeed counts a gradient on this rank of a model parallel group.

    Args:
        tagged: tensor with the tags of the parameter.
        is_first_rank: whether this is the first rank of that group.
    """
    if getattr(tagged, "ds_pipe_replicated", False):
        return False
    return is_first_rank or is_model_parallel_parameter(tagged)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of all elements, [] fp64; needs at least one tensor, no copies."""
    norms = norms_of([t.detach() for t in tensors], 2, torch.float64)
    return torch.stack(norms).square().sum()


class _NormOfAllGroups:
    """Replaces ``scaled_global_norm``: computes the norms of all groups together."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._original = optimizer.scaled_global_norm

    def __call__(self, norm_type: float = 2) -> Tensor:
        optimizer = self._optimizer
        if norm_type != 2:  # DeepSpeed raises its error
            return self._original(norm_type)
        norms = iter(self._norms_of_groups().unbind())
        optimizer.get_grad_norm_direct = lambda *_, **__: next(norms)
        try:
            return self._original(norm_type)
        finally:
            del optimizer.get_grad_norm_direct  # uncovers the class's method

    def _norms_of_groups(self) -> Tensor:
        """Return [groups] fp32: norms over the data parallel ranks, -1 if not finite."""
        optimizer = self._optimizer
        squares = [
            self._sum_of_squares(optimizer.averaged_gradients[i], optimizer.params_in_partition[i])
            for i in range(len(optimizer.bit16_groups))
        ]
        total = torch.stack(squares)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=optimizer.dp_process_group)
        optimizer._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        norms = total.pow(0.5)
        return norms.masked_fill(~norms.isfinite(), -1.0)

    def _sum_of_squares(
        self, gradients: Iterable[Tensor], params: Iterable[nn.Parameter]
    ) -> Tensor:
        """Return [] fp32 for this rank's part of a group; only gradients that DeepSpeed counts."""
        optimizer = self._optimizer
        no_padding = (g for g in gradients if not getattr(g, "_zero_padding", False))
        is_first_rank = optimizer.model_parallel_rank == 0
        pairs = zip(no_padding, params)  # noqa: B905 - padding has no parameter
        counted = [grad for grad, param in pairs if is_counted(param, is_first_rank)]
        if not counted:
            return torch.zeros((), device=optimizer.device)
        return sum_of_squares(counted).float()


class _AverageOfExpertNorms:
    """Replaces ``_average_expert_grad_norms``: one all-reduce per process group."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self._optimizer = optimizer

    def __call__(self, norm_groups: list[Tensor]) -> None:
        optimizer = self._optimizer
        by_ranks: dict[Any, list[int]] = {}
        for i, is_expert in enumerate(optimizer.is_moe_param_group):
            if is_expert:
                by_ranks.setdefault(optimizer.real_dp_process_group[i], []).append(i)
        for group, indices in by_ranks.items():
            scaled = torch.stack([norm_groups[i] for i in indices]) * 1.0
            scaled = scaled / dist.get_world_size(group=group)
            dist.all_reduce(scaled, group=group)
            for i, norm in zip(indices, scaled.unbind(), strict=True):
                norm_groups[i] = norm


class _ClipByOneFactor:
    """Replaces ``unscale_and_clip_grads``: computes DeepSpeed's factor once per norm."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._original = optimizer.unscale_and_clip_grads
        self._norm: Tensor | None = None
        self._scale: Any = None
        self._factor: Tensor | None = None

    def __call__(self, grad_groups_flat: Sequence[Any], total_norm: Tensor | None) -> None:
        optimizer = self._optimizer
        if optimizer.clip_grad <= 0 or not torch.is_tensor(total_norm):
            return self._original(grad_groups_flat, total_norm)
        factor = self._factor
        if factor is None or total_norm is not self._norm or optimizer.loss_scale != self._scale:
            factor = torch.ones((), device=total_norm.device)
            self._norm, self._scale, self._factor = total_norm, optimizer.loss_scale, factor
            self._original([factor], total_norm)
        for grads in grad_groups_flat:
            tensors = grads if isinstance(grads, list) else [grads]
            multiply_([grad.data for grad in tensors], factor)
        return None
