# SPDX-License-Identifier: Apache-2.0
"""What ZeRO 1 and 2 need not do for stacked experts; the results are the same to the bit.

Where every rank of the data parallel group has experts of its own (ep_size is the number of ranks),
the group that shares a stack has one rank. ZeRO still copies the stack's gradient into a bucket,
flattens it, reduces it over that rank, copies it back and out of the bucket again, after every
micro-batch with ZeRO 2. All that is needed is to divide it by the number of ranks.

ZeRO takes a gradient's norm of a copy in fp64, four times its size: of a stack that is the most
memory of the whole step, so the norm is taken of pieces (equal to fp64's rounding).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

NORM_PIECE_NUMEL = 2**25  # 256 MiB in fp64


def install_shortcuts(optimizer: Any, stacks: Iterable[nn.Parameter]) -> None:
    """Spare an optimizer needless work; does nothing to others than ZeRO 1's and 2's.

    Checked with DeepSpeed 0.19.6 and 0.19.8.

    Args:
        optimizer: the engine's.
        stacks: the model's.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    if optimizer.cpu_offload or getattr(optimizer, "zenflow", False):
        return
    optimizer.get_grad_norm_direct = _NormInPieces(optimizer)
    is_plain = optimizer.reduce_scatter and optimizer.contiguous_gradients
    if is_plain and not optimizer.overlap_comm and not _accumulates_elsewhere(optimizer):
        lone = {id(s) for s in stacks if _is_lone(optimizer, s)}
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = _LoneDivided(optimizer, lone)
        optimizer.copy_grads_in_partition = _CopyOfOthers(optimizer, lone)


def _is_lone(optimizer: DeepSpeedZeroOptimizer, stack: nn.Parameter) -> bool:
    """Whether one rank has a stack alone, and would not round its gradient to send it."""
    group = optimizer.expert_dp_process_group.get(stack.group_name)
    is_alone = group is not None and dist.get_world_size(group=group) == 1
    return is_alone and optimizer.get_param_comm_dtype(stack) == stack.dtype


def _accumulates_elsewhere(optimizer: DeepSpeedZeroOptimizer) -> bool:
    """Whether gradients are summed up in another dtype or buffer, by code that copies them."""
    if getattr(optimizer, "use_grad_accum_attribute", False):
        return True
    uses_buffer = getattr(optimizer, "_use_compact_grad_partition_buffer", None)
    return uses_buffer is not None and any(map(uses_buffer, range(len(optimizer.bit16_groups))))


class _NormInPieces:
    """``get_grad_norm_direct`` of gradients in pieces."""

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._original = optimizer.get_grad_norm_direct

    def __call__(
        self, gradients: Iterable[Tensor], params: Iterable[Tensor], *args: Any, **kwargs: Any
    ) -> Tensor:
        pieces, owners = [], []
        found = (g for g in gradients if not getattr(g, "_zero_padding", False))
        for grad, param in zip(found, params):  # noqa: B905 - DeepSpeed's: padding has no parameter
            own = [grad]
            if grad.numel() > NORM_PIECE_NUMEL and grad.is_contiguous():
                own = list(grad.view(-1).split(NORM_PIECE_NUMEL))
            pieces += own
            owners += [param] * len(own)
        return self._original(pieces, owners, *args, **kwargs)


class _LoneDivided:
    """``reduce_independent_p_g_buckets_and_remove_grads``, which only divides lone stacks.

    Args:
        optimizer: whose method it is.
        lone: ids of the stacks that one rank has alone.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, lone: set[int]) -> None:
        self._optimizer, self._lone = optimizer, lone
        self._original = optimizer.reduce_independent_p_g_buckets_and_remove_grads

    def __call__(self, param: nn.Parameter, i: int) -> None:
        optimizer = self._optimizer
        grad, param_id = param.grad, optimizer.get_param_id(param)
        is_simple = id(param) in self._lone and grad is not None
        if not is_simple or optimizer.params_already_reduced[param_id]:  # an error, DeepSpeed's
            return self._original(param, i)
        if not getattr(param, "ds_grad_is_ready", True):
            return None
        if optimizer.gradient_average:
            num_ranks = dist.get_world_size(group=optimizer.dp_process_group)
            grad.div_(num_ranks / float(optimizer.sequence_parallel_size))
        optimizer.params_already_reduced[param_id] = True
        return None


class _CopyOfOthers:
    """``copy_grads_in_partition``, with a buffer that has no room for lone stacks.

    Args:
        optimizer: whose method it is.
        lone: ids of the stacks that one rank has alone.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, lone: set[int]) -> None:
        self._optimizer, self._lone = optimizer, lone
        self._original = optimizer.copy_grads_in_partition

    def __call__(self, param: nn.Parameter, *args: Any) -> None:
        optimizer = self._optimizer
        if id(param) not in self._lone and optimizer.grads_in_partition is None:
            parts = (p for group in optimizer.params_in_partition for p in group)
            size = sum(p.numel() for p in parts if id(p) not in self._lone)
            optimizer.grads_in_partition_offset = 0
            optimizer.grads_in_partition = torch.empty(
                size, dtype=optimizer.dtype, device=param.grad.device
            )
        self._original(param, *args)
