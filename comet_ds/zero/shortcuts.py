# SPDX-License-Identifier: Apache-2.0
"""Work that ZeRO 1 and 2 can skip for stacked experts.

If ep_size is the number of data parallel ranks, each rank has experts of its own, and the process
group that shares a stack has one rank. Such a stack is called unshared here. ZeRO still copies its
gradient into a bucket, flattens it, reduces it over the one rank and copies it back. ZeRO 2 does so
after every micro-batch, and adds the result to the sum of earlier ones. It is enough to accumulate
the gradient in place and to divide it by the number of ranks at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

from comet_ds._compat.deepspeed import (
    Engine,
    ZeroOptimizer,
    accumulates_in_buffer,
    expert_group_name,
    is_zero_optimizer,
)
from comet_ds.zero import norm as zero_norm
from comet_ds.zero import unsharded


def install_shortcuts(engine: Engine, stacks: Iterable[nn.Parameter]) -> None:
    """Replace methods of an engine and its optimizer by cheaper ones, where they apply.

    Checked with DeepSpeed 0.19.6 and 0.19.8.

    Args:
        engine: engine with a configured optimizer.
        stacks: all stacks of the model.
    """
    optimizer = engine.optimizer
    unsharded.install_reduction(engine)
    if isinstance(optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        unsharded.install_norm(optimizer)
    if not is_zero_optimizer(optimizer):
        return
    if optimizer.cpu_offload or getattr(optimizer, "zenflow", False):
        return
    zero_norm.install_norm(optimizer)
    is_plain = optimizer.reduce_scatter and optimizer.contiguous_gradients
    if is_plain and not optimizer.overlap_comm and not _accumulates_elsewhere(optimizer):
        unshared = {id(s) for s in stacks if _is_unshared(optimizer, s)}
        in_place = _can_sum_in_place(optimizer)
        accumulated = _AccumulateInPlace(optimizer, unshared) if in_place else None
        reduce = _ReduceByDividing(optimizer, unshared, accumulated)
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = reduce
        optimizer.copy_grads_in_partition = _CopySharedGrads(optimizer, unshared)


def _is_unshared(optimizer: ZeroOptimizer, stack: nn.Parameter) -> bool:
    """Return whether only this rank has a stack, and its gradient is not rounded to be reduced."""
    group = optimizer.expert_dp_process_group.get(expert_group_name(stack))
    is_alone = group is not None and dist.get_world_size(group=group) == 1
    return is_alone and optimizer.get_param_comm_dtype(stack) == stack.dtype


def _accumulates_elsewhere(optimizer: ZeroOptimizer) -> bool:
    """Return whether DeepSpeed accumulates gradients in another dtype or buffer."""
    if getattr(optimizer, "use_grad_accum_attribute", False):
        return True
    return accumulates_in_buffer(optimizer)


def _divisor(optimizer: ZeroOptimizer) -> float:
    """Return the number by which ZeRO divides a gradient."""
    num_ranks = dist.get_world_size(group=optimizer.dp_process_group)
    return num_ranks / float(optimizer.sequence_parallel_size)


def _can_sum_in_place(optimizer: ZeroOptimizer) -> bool:
    """Return whether ZeRO 2 may divide the sum of the micro-batches instead of each, bit for bit.

    Dividing by a power of two changes the exponent only. In fp16 the undivided sum may overflow.
    """
    is_exact = math.log2(_divisor(optimizer)).is_integer() and optimizer.dtype != torch.float16
    return is_exact and optimizer.partition_gradients and optimizer.gradient_average


class _ReduceByDividing:
    """Replaces ``reduce_independent_p_g_buckets_and_remove_grads``: divides unshared stacks' grads.

    Args:
        optimizer: the optimizer whose method it replaces.
        unshared: ids of the unshared stacks.
        accumulated: divides the gradients of its groups later; None if there are none.
    """

    def __init__(
        self,
        optimizer: ZeroOptimizer,
        unshared: set[int],
        accumulated: _AccumulateInPlace | None,
    ) -> None:
        self._optimizer, self._unshared, self._accumulated = optimizer, unshared, accumulated
        self._original = optimizer.reduce_independent_p_g_buckets_and_remove_grads

    def __call__(self, param: nn.Parameter, i: int) -> None:
        optimizer = self._optimizer
        grad, param_id = param.grad, optimizer.get_param_id(param)
        is_unshared = id(param) in self._unshared
        # For a parameter that was reduced already, DeepSpeed raises its error.
        if grad is None or not is_unshared or optimizer.params_already_reduced[param_id]:
            return self._original(param, i)
        if not getattr(param, "ds_grad_is_ready", True):
            return None
        is_divided_later = self._accumulated is not None and i in self._accumulated.groups
        if optimizer.gradient_average and not is_divided_later:
            grad.div_(_divisor(optimizer))
        optimizer.params_already_reduced[param_id] = True
        return None


class _AccumulateInPlace:
    """Makes ZeRO 2 accumulate the gradients of unshared stacks in ``grad``.

    DeepSpeed removes the gradient of every micro-batch and adds it to the first one's. Here the sum
    of the earlier micro-batches is put back into ``grad`` before the next backward, so that
    autograd adds to it, as with ZeRO 1. It is divided before the step.

    Args:
        optimizer: the optimizer whose methods it replaces.
        unshared: ids of the unshared stacks.

    Attributes:
        groups: indices of the parameter groups that hold unshared stacks only.
    """

    def __init__(self, optimizer: ZeroOptimizer, unshared: set[int]) -> None:
        self._optimizer = optimizer
        self.groups = frozenset(
            i
            for i, group in enumerate(optimizer.bit16_groups)
            if all(id(p) in unshared for p in group)
        )
        self._epilogue = optimizer.independent_gradient_partition_epilogue
        self._finalize = optimizer.finalize_gradient_accumulation_boundary
        optimizer.independent_gradient_partition_epilogue = self._end_micro_batch
        optimizer.finalize_gradient_accumulation_boundary = self._end_unmanaged

    def _end_micro_batch(self) -> None:
        """Replace ``independent_gradient_partition_epilogue``, called after each backward."""
        optimizer = self._optimizer
        is_last = optimizer.is_gradient_accumulation_boundary()
        for i in self.groups:
            self._keep_sums(i)
            optimizer.all_grad_tensors[i] = None  # then DeepSpeed reads the gradients from grad
            if is_last:
                self._divide(p.grad for p in optimizer.params_in_partition[i])
        self._epilogue()
        if not is_last:
            for i in self.groups:
                sums = optimizer.all_grad_tensors[i] or ()
                for param, grad in zip(optimizer.params_in_partition[i], sums, strict=True):
                    param.grad = grad

    def _keep_sums(self, i: int) -> None:
        """Add the earlier sum again if someone, such as ``zero_grad``, removed it from ``grad``."""
        sums = self._optimizer.all_grad_tensors.get(i) or ()
        for param, grad in zip(self._optimizer.params_in_partition[i], sums, strict=False):
            if param.grad is None:
                param.grad = grad
            elif grad is not None and param.grad.data_ptr() != grad.data_ptr():
                param.grad.add_(grad)

    def _end_unmanaged(self) -> None:
        """Replace ``finalize_gradient_accumulation_boundary``: the user decides when to step."""
        for i in self.groups:
            self._divide(self._optimizer.all_grad_tensors.get(i) or ())
        self._finalize()
        for i in self.groups:
            for param in self._optimizer.params_in_partition[i]:
                param.grad = None

    def _divide(self, grads: Iterable[Tensor | None]) -> None:
        for grad in grads:
            if grad is not None:
                grad.div_(_divisor(self._optimizer))


class _CopySharedGrads:
    """Replaces ``copy_grads_in_partition``: its buffer has no space for unshared stacks.

    Args:
        optimizer: the optimizer whose method it replaces.
        unshared: ids of the unshared stacks.
    """

    def __init__(self, optimizer: ZeroOptimizer, unshared: set[int]) -> None:
        self._optimizer, self._unshared = optimizer, unshared
        self._original = optimizer.copy_grads_in_partition

    def __call__(self, param: nn.Parameter, *args: Any) -> None:
        optimizer = self._optimizer
        if id(param) not in self._unshared and optimizer.grads_in_partition is None:
            params = (p for group in optimizer.params_in_partition for p in group)
            size = sum(p.numel() for p in params if id(p) not in self._unshared)
            assert param.grad is not None, "DeepSpeed copies gradients that are there"
            optimizer.grads_in_partition_offset = 0
            optimizer.grads_in_partition = torch.empty(
                size, dtype=optimizer.dtype, device=param.grad.device
            )
        self._original(param, *args)
