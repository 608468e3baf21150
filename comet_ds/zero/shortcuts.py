# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's optimizers need not do for stacked experts: of ZeRO 1 and 2 here.

Where every rank of the data parallel group has experts of its own (ep_size is the number of
ranks), the group that shares a stack has one rank. ZeRO still copies the stack's gradient into a
bucket, flattens it, reduces it over that rank, copies it back and out of the bucket again. ZeRO 2
does so after every micro-batch, and adds the gradient to those before. All that is needed is to let
the gradient grow in place and to divide it by the number of ranks in the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from comet_ds.zero import norm as zero_norm
from comet_ds.zero import unsharded


def install_shortcuts(engine: DeepSpeedEngine, stacks: Iterable[nn.Parameter]) -> None:
    """Spare an engine and its optimizer needless work, where there is a shortcut.

    Checked with DeepSpeed 0.19.6 and 0.19.8.

    Args:
        engine: whose optimizer is configured.
        stacks: the model's.
    """
    optimizer = engine.optimizer
    unsharded.install_reduction(engine)
    if isinstance(optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        unsharded.install_norm(optimizer)
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    if optimizer.cpu_offload or getattr(optimizer, "zenflow", False):
        return
    zero_norm.install_norm(optimizer)
    is_plain = optimizer.reduce_scatter and optimizer.contiguous_gradients
    if is_plain and not optimizer.overlap_comm and not _accumulates_elsewhere(optimizer):
        lone = {id(s) for s in stacks if _is_lone(optimizer, s)}
        growing = _GrowingGrads(optimizer, lone) if _may_grow(optimizer) else None
        reduce = _LoneDivided(optimizer, lone, growing)
        optimizer.reduce_independent_p_g_buckets_and_remove_grads = reduce
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


def _divisor(optimizer: DeepSpeedZeroOptimizer) -> float:
    """Return what ZeRO divides a gradient by."""
    num_ranks = dist.get_world_size(group=optimizer.dp_process_group)
    return num_ranks / float(optimizer.sequence_parallel_size)


def _may_grow(optimizer: DeepSpeedZeroOptimizer) -> bool:
    """Whether dividing the sum of ZeRO 2's micro-batches gives the bits of the divided ones' sum.

    Powers of two only move the exponent; but a sum in fp16 may overflow before it is divided.
    """
    is_exact = math.log2(_divisor(optimizer)).is_integer() and optimizer.dtype != torch.float16
    return is_exact and optimizer.partition_gradients and optimizer.gradient_average


class _LoneDivided:
    """``reduce_independent_p_g_buckets_and_remove_grads``, which only divides lone stacks.

    Args:
        optimizer: whose method it is.
        lone: ids of the stacks that one rank has alone.
        growing: those whose gradients are divided later; None for none.
    """

    def __init__(
        self,
        optimizer: DeepSpeedZeroOptimizer,
        lone: set[int],
        growing: _GrowingGrads | None,
    ) -> None:
        self._optimizer, self._lone, self._growing = optimizer, lone, growing
        self._original = optimizer.reduce_independent_p_g_buckets_and_remove_grads

    def __call__(self, param: nn.Parameter, i: int) -> None:
        optimizer = self._optimizer
        grad, param_id = param.grad, optimizer.get_param_id(param)
        is_simple = id(param) in self._lone and grad is not None
        if not is_simple or optimizer.params_already_reduced[param_id]:  # an error, DeepSpeed's
            return self._original(param, i)
        if not getattr(param, "ds_grad_is_ready", True):
            return None
        is_growing = self._growing is not None and i in self._growing.groups
        if optimizer.gradient_average and not is_growing:
            grad.div_(_divisor(optimizer))
        optimizer.params_already_reduced[param_id] = True
        return None


class _GrowingGrads:
    """Gradients of lone stacks that ZeRO 2 leaves in ``grad`` from one micro-batch to the next.

    DeepSpeed takes every micro-batch's gradient away and adds it to the first one's. Here the sum
    of those before stands in ``grad`` when a backward begins, so that it grows where it is, as with
    ZeRO 1, and is divided when the step comes.

    Args:
        optimizer: whose methods are replaced.
        lone: ids of the stacks that one rank has alone.

    Attributes:
        groups: the parameter groups that have no other parameters.
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer, lone: set[int]) -> None:
        self._optimizer = optimizer
        self.groups = frozenset(
            i for i, group in enumerate(optimizer.bit16_groups) if all(id(p) in lone for p in group)
        )
        self._epilogue = optimizer.independent_gradient_partition_epilogue
        self._finalize = optimizer.finalize_gradient_accumulation_boundary
        optimizer.independent_gradient_partition_epilogue = self._end_micro_batch
        optimizer.finalize_gradient_accumulation_boundary = self._end_unmanaged

    def _end_micro_batch(self) -> None:
        """``independent_gradient_partition_epilogue``, behind each backward."""
        optimizer = self._optimizer
        is_last = optimizer.is_gradient_accumulation_boundary()
        for i in self.groups:
            self._keep_sums(i)
            optimizer.all_grad_tensors[i] = None  # DeepSpeed takes what stands in grad
            if is_last:
                self._divide(p.grad for p in optimizer.params_in_partition[i])
        self._epilogue()
        if not is_last:
            for i in self.groups:
                sums = optimizer.all_grad_tensors[i]
                for param, grad in zip(optimizer.params_in_partition[i], sums, strict=True):
                    param.grad = grad

    def _keep_sums(self, i: int) -> None:
        """Add sums that someone has taken out of ``grad``, ``zero_grad`` for one."""
        sums = self._optimizer.all_grad_tensors.get(i) or ()
        for param, grad in zip(self._optimizer.params_in_partition[i], sums, strict=False):
            if param.grad is None:
                param.grad = grad
            elif param.grad.data_ptr() != grad.data_ptr():
                param.grad.add_(grad)

    def _end_unmanaged(self) -> None:
        """``finalize_gradient_accumulation_boundary``, where the user says when to step."""
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
