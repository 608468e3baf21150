# SPDX-License-Identifier: Apache-2.0
"""Every private name of DeepSpeed that the package uses.

Checked with DeepSpeed 0.19.6 and 0.19.8. Most names stand below: as functions, as names of methods
that are replaced, and as the protocols of an engine and of its ZeRO optimizer. These stay where
they are used:

    interop/overrides  sharded_moe._capacity, _stack_routes, _top_idx and _one_hot_to_float
                       (0.19.6), _AllToAll, _route_slots, _sparse_encode, _sparse_decode:
                       functions; it is noticed when the user replaces one
    gate, moe_layer    TopKGate._set_ep_group, MOELayer._set_ep_group: methods that ours override
    zero/norm          a gradient's _zero_padding (not in 0.19.6): marks padding of a partition
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeGuard

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups, logger
from torch import Tensor, nn

# ---- groups of ranks ---------------------------------------------------------------------------


def expert_tensor_parallel_size() -> int:
    """Return how many ranks share a part of each expert; 1 where experts are whole."""
    return groups._get_expert_model_parallel_world_size()


def expert_parallel_groups() -> Mapping[str, Any]:
    """Return the expert parallel groups of this rank by name, ``ep_size_<W>``."""
    return groups._get_expert_parallel_group_dict()


def largest_expert_parallel_rank() -> int:
    """Return this rank in the largest expert parallel group, which names ZeRO 0's files."""
    return groups._get_expert_parallel_rank(groups._get_max_expert_size_name())


def data_parallel_group() -> Any:
    """Return the group of the ranks that bring tokens of their own."""
    return groups._get_data_parallel_group()


# ---- the engine --------------------------------------------------------------------------------

# Methods of DeepSpeedEngine that are wrapped or replaced, by name; ``zero/hooks.py`` says why.
CONFIGURE_MODEL = "_configure_distributed_model"
CONFIGURE_OPTIMIZER = "_configure_optimizer"
CHECK_OPTIMIZER = "_do_optimizer_sanity_check"
LOAD_CHECKPOINT = "_load_checkpoint"
FROZEN_ATTRIBUTES = "_get_zero_frozen_param_attributes"
SHARED_PARAMS = "_get_shared_params"
PARAM_SHAPES = "_get_zero_param_shapes"
TAKE_STEP = "_take_model_step"  # of the engine and of the pipeline engine


class Engine(Protocol):
    """What the package uses of a ``DeepSpeedEngine``.

    Attributes:
        module: the user's model.
        optimizer: DeepSpeed's around the basic one, or the basic one, or None.
        param_names: of ``module``, as DeepSpeed has them for its files.
        allreduce_and_copy: (gradients, group, world size or None); replaced.
        seq_dp_world_size, seq_data_parallel_group: of data and sequence parallel ranks.
    """

    module: nn.Module
    optimizer: Any
    lr_scheduler: Any
    checkpoint_engine: Any
    param_names: dict[nn.Parameter, str]
    global_rank: int
    gradient_average: bool
    communication_data_type: torch.dtype
    seq_dp_world_size: int
    seq_data_parallel_group: Any
    allreduce_and_copy: Callable[..., None]
    load_module_state_dict: Callable[..., Any]
    module_state_dict: Callable[..., Any]

    def zero_optimization(self) -> bool:
        """Whether ZeRO is on."""
        ...

    def zero_optimization_stage(self) -> int:
        """Return the stage, 0 to 3."""
        ...

    def zero_elastic_checkpoint(self) -> bool:
        """Whether checkpoints may be loaded by another number of ranks."""
        ...

    def load_universal_checkpoint(self) -> bool:
        """Whether universal checkpoints are loaded."""
        ...

    def fp16_enabled(self) -> bool:
        """Whether the model is in float16."""
        ...

    def bfloat16_enabled(self) -> bool:
        """Whether the model is in bfloat16."""
        ...

    def gradient_predivide_factor(self) -> float:
        """Return what gradients are divided by before they are reduced."""
        ...

    def optimizer_name(self) -> str:
        """Return the name of the JSON's optimizer."""
        ...

    def optimizer_params(self) -> Mapping[str, Any] | None:
        """Return the JSON's parameters of the optimizer."""
        ...


def warn_once(message: str) -> None:
    """Print a message on rank 0, once; by a function that DeepSpeed puts on its logger.

    As a warning, because DeepSpeed's logger hides everything below.
    """
    vars(logger)["log_dist_once"](message, ranks=[0], level=logging.WARNING)


def accelerator() -> Any:
    """Return DeepSpeed's accelerator, public, which its annotations take for optional."""
    return get_accelerator()


def expert_group_name(param: Any) -> str:
    """Return DeepSpeed's tag of an expert's parameter, ``ep_size_<W>``."""
    return param.group_name


def config_of(engine: Any) -> Any:
    """Return an engine's ``DeepSpeedConfig``."""
    return engine._config


def json_of(engine: Any) -> Mapping[str, Any]:
    """Return the JSON that an engine was configured with."""
    return engine._config._param_dict


def model_file(engine: Any, folder: str, tag: str) -> str:
    """Return the path of a checkpoint's model states."""
    return engine._get_ckpt_name(folder, tag)


def zero_file(engine: Any, folder: str, tag: str) -> str:
    """Return the path of this rank's optimizer states, ZeRO and BF16_Optimizer."""
    return engine._get_zero_ckpt_name(folder, tag)


def optimizer_file(engine: Any, folder: str, tag: str) -> str:
    """Return the path of this rank's optimizer states at ZeRO stage 0."""
    return engine._get_optimizer_ckpt_name(folder, tag, largest_expert_parallel_rank())


# ---- ZeRO 1 and 2 ------------------------------------------------------------------------------


class ZeroOptimizer(Protocol):
    """What the package uses of ``DeepSpeedZeroOptimizer``, ZeRO stages 1 and 2.

    Lists are by parameter group. What is a Callable here is a method that ``zero`` replaces.

    Attributes:
        bit16_groups: the model's parameters.
        params_in_partition: those of this rank's part.
        averaged_gradients: of ``params_in_partition``, in fp32 or the model's dtype.
        all_grad_tensors: sums of the micro-batches so far; None before the first.
        params_already_reduced: by ``get_param_id``.
        real_dp_process_group: ranks that share a group's parameters.
        expert_dp_process_group: ranks that share experts, by ``expert_group_name``.
        grads_in_partition: flat buffer of ZeRO 2, with the offset of what comes next.
        partition_gradients: whether the stage is 2.
    """

    bit16_groups: list[list[nn.Parameter]]
    params_in_partition: list[list[nn.Parameter]]
    averaged_gradients: dict[int, list[Tensor]]
    all_grad_tensors: dict[int, list[Tensor | None] | None]
    params_already_reduced: list[bool]
    is_moe_param_group: list[bool]
    real_dp_process_group: list[Any]
    dp_process_group: Any
    expert_dp_process_group: Mapping[str, Any]
    sequence_parallel_size: int
    model_parallel_rank: int
    device: torch.device
    dtype: torch.dtype
    cpu_offload: bool
    reduce_scatter: bool
    contiguous_gradients: bool
    overlap_comm: bool
    partition_gradients: bool
    gradient_average: bool
    clip_grad: float
    loss_scale: float
    grads_in_partition: Tensor | None
    grads_in_partition_offset: int

    scaled_global_norm: Callable[..., Tensor]
    get_grad_norm_direct: Callable[..., Tensor]
    unscale_and_clip_grads: Callable[..., None]
    reduce_independent_p_g_buckets_and_remove_grads: Callable[[nn.Parameter, int], None]
    copy_grads_in_partition: Callable[..., None]
    independent_gradient_partition_epilogue: Callable[[], None]
    finalize_gradient_accumulation_boundary: Callable[[], None]
    _average_expert_grad_norms: Callable[[list[Tensor]], None]

    def get_param_id(self, param: nn.Parameter) -> int:
        """Return DeepSpeed's number of a parameter."""
        ...

    def get_param_comm_dtype(self, param: nn.Parameter) -> torch.dtype:
        """Return the dtype a parameter's gradient is sent in."""
        ...

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro-batch is a step's last."""
        ...

    def _model_parallel_all_reduce(self, tensor: Tensor, op: Any) -> None:
        """Reduce over the ranks of a tensor parallel group."""
        ...


def is_zero_optimizer(optimizer: object) -> TypeGuard[ZeroOptimizer]:
    """Return whether an optimizer is ZeRO's, stage 1 or 2."""
    return isinstance(optimizer, DeepSpeedZeroOptimizer)


def accumulates_in_buffer(optimizer: ZeroOptimizer) -> bool:
    """Return whether gradients are summed up in a buffer of their own; 0.19.6 has none."""
    uses_buffer = getattr(optimizer, "_use_compact_grad_partition_buffer", None)
    return uses_buffer is not None and any(map(uses_buffer, range(len(optimizer.bit16_groups))))
