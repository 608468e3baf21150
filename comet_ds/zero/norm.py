# SPDX-License-Identifier: Apache-2.0
"""The gradients' norm and clipping of ZeRO 1 and 2, for parameter groups that are one stack each.

DeepSpeed takes the norm of a group from copies in fp64, four times the size of bf16 gradients, and
waits for the GPU once a group in the norm and once more before clipping. With one parameter per
expert that is a fraction of a step; with stacks, a group of which is a third of a layer, it is more
than a tenth. Here norms are summed up in fp64 without a copy, all groups travel in one message, and
the factor that clips is computed once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn


def install_norm(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Replace how an optimizer takes norms and clips; results differ by fp64's rounding at most."""
    optimizer.scaled_global_norm = _NormOfAllGroups(optimizer)
    optimizer._average_expert_grad_norms = _AverageOfExpertNorms(optimizer)
    optimizer.unscale_and_clip_grads = _ClipByOneFactor(optimizer)


def is_counted(tagged: Tensor, is_first_rank: bool) -> bool:
    """Whether DeepSpeed counts a gradient on this rank of a model parallel group.

    Args:
        tagged: what has the tags of the parameter.
        is_first_rank: of that group.
    """
    if getattr(tagged, "ds_pipe_replicated", False):
        return False
    return is_first_rank or is_model_parallel_parameter(tagged)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return it as 0-dim fp64, summed up in fp64 without a copy; at least one tensor."""
    norms = torch._foreach_norm([t.detach() for t in tensors], 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


class _NormOfAllGroups:
    """``scaled_global_norm``, whose groups' norms are taken together."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._original = optimizer.scaled_global_norm

    def __call__(self, norm_type: float = 2) -> Tensor:
        optimizer = self._optimizer
        if norm_type != 2:  # an error, DeepSpeed's
            return self._original(norm_type)
        norms = iter(self._norms_of_groups().unbind())
        optimizer.get_grad_norm_direct = lambda *_, **__: next(norms)
        try:
            return self._original(norm_type)
        finally:
            del optimizer.get_grad_norm_direct  # the class has the method

    def _norms_of_groups(self) -> Tensor:
        """Return [groups] fp32: norms over the data parallel ranks, -1 where one is not finite."""
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
        """Return it as fp32, of this rank's part of a group; DeepSpeed's choice of gradients."""
        optimizer = self._optimizer
        found = (g for g in gradients if not getattr(g, "_zero_padding", False))
        is_first_rank = optimizer.model_parallel_rank == 0
        pairs = zip(found, params)  # noqa: B905 - padding has no parameter
        counted = [grad for grad, param in pairs if is_counted(param, is_first_rank)]
        if not counted:
            return torch.zeros((), device=optimizer.device)
        return sum_of_squares(counted).float()


class _AverageOfExpertNorms:
    """``_average_expert_grad_norms`` with one message for all groups of the same ranks."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
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
    """``unscale_and_clip_grads``, whose factor is DeepSpeed's, computed once for a norm."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._original = optimizer.unscale_and_clip_grads
        self._norm: Tensor | None = None
        self._scale: Any = None
        self._factor: Tensor | None = None

    def __call__(self, grad_groups_flat: Sequence[Any], total_norm: Tensor | None) -> None:
        optimizer = self._optimizer
        if optimizer.clip_grad <= 0 or not torch.is_tensor(total_norm):
            return self._original(grad_groups_flat, total_norm)
        if total_norm is not self._norm or optimizer.loss_scale != self._scale:
            self._norm, self._scale = total_norm, optimizer.loss_scale
            self._factor = torch.ones((), device=total_norm.device)
            self._original([self._factor], total_norm)
        for grads in grad_groups_flat:
            found = grads if isinstance(grads, list) else [grads]
            torch._foreach_mul_([grad.data for grad in found], self._factor)
        return None
