# SPDX-License-Identifier: Apache-2.0
"""Work that DeepSpeed can skip for stacked experts without ZeRO.

In half precision DeepSpeed checks gradients for overflow one by one, and computes their norms one
by one, with about ten launches and a wait for the GPU each while the GPU is idle. Here all
gradients are checked together. DeepSpeed also copies the gradients of stacks that only one rank has
into a bucket and back to divide them. Here they are divided in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank
from torch import Tensor, nn

from comet_ds._compat.deepspeed import Engine
from comet_ds._compat.torch import multiply_, norms_of
from comet_ds.zero.norm import is_counted, sum_of_squares


def install_norm(optimizer: FP16_Optimizer | FP16_UnfusedOptimizer) -> None:
    """Replace an optimizer's overflow check, and the norm of an FP16_UnfusedOptimizer.

    Checked with DeepSpeed 0.19.6 and 0.19.8.
    """
    checker = optimizer.overflow_checker
    original = checker.has_overflow_serial
    checker.has_overflow_serial = functools.partial(_has_overflow, original)
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.step = functools.partial(_step, optimizer.step)


def install_reduction(engine: Engine) -> None:
    """Replace an engine's reduction of gradients over a group of one rank; the bits are equal."""
    engine.allreduce_and_copy = functools.partial(_reduce, engine, engine.allreduce_and_copy)


def _reduce(
    engine: Engine,
    original: Any,
    grads: list[Tensor],
    dp_group: Any,
    dp_world_size: int | None = None,
) -> None:
    """Replace ``DeepSpeedEngine.allreduce_and_copy``."""
    is_unshared = dist.get_world_size(group=dp_group) == 1
    is_plain = engine.gradient_average and engine.gradient_predivide_factor() == 1.0
    is_rounded = any(grad.dtype != engine.communication_data_type for grad in grads)
    if dp_world_size is None or not (is_unshared and is_plain) or is_rounded:
        original(grads, dp_group, dp_world_size)
    elif dp_world_size != 1:
        multiply_([grad.data for grad in grads], 1.0 / dp_world_size)


def _has_overflow(original: Any, params: Iterable[nn.Parameter]) -> bool:
    """Replace ``CheckOverflow.has_overflow_serial``: whether a gradient is not finite."""
    params = list(params)
    grads = [p.grad.detach() for p in params if p.grad is not None and p.grad.numel() > 0]
    if not grads:
        return False
    if any(grad.layout != torch.strided for grad in grads):
        return original(params)
    largest = norms_of(grads, torch.inf)  # NaN for a gradient that has one
    return not bool(torch.stack([norm.float() for norm in largest]).isfinite().all())


def _step(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a step with ``_weight_norm`` in the place of the module's ``get_weight_norm``."""
    replaced = unfused_optimizer.get_weight_norm
    unfused_optimizer.get_weight_norm = functools.partial(_weight_norm, replaced)
    try:
        return original(*args, **kwargs)
    finally:
        unfused_optimizer.get_weight_norm = replaced


def _weight_norm(
    original: Any, parameters: Tensor | Iterable[Tensor], norm_type: float = 2, mpu: Any = None
) -> float:
    """Replace ``get_weight_norm``: norm of all tensors, -1 if not finite; equal to 2e-7."""
    if norm_type != 2 or isinstance(parameters, Tensor):
        return original(parameters, norm_type, mpu)
    is_first_rank = bwc_tensor_model_parallel_rank(mpu=mpu) == 0
    counted = [p for p in parameters if is_counted(p, is_first_rank)]
    if not counted:
        return original(parameters, norm_type, mpu)
    total = sum_of_squares(counted).sqrt().float()
    vars(total)["model_parallel"] = True  # so that the original function counts it on every rank
    return original([total], norm_type, mpu)
