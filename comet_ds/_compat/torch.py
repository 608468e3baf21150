# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that the package uses.

Checked with torch 2.11.0, 2.13.0 and 2.14.1. Most names stand below, behind a function or an alias.
These stay where they are used, because they are what the code there is about:

    experts, checkpoints/layout  nn.Module._parameters, _buffers, _modules: where modules look
                                 parameters up; stacks put dictionaries of views there
    experts                      nn.Module._apply: moves and casts modules
    experts/views                torch.distributed._composable: its name tells FSDP's calls
    zero, checkpoints            LRScheduler._last_lr, SequentialLR._schedulers: values of a
                                 scheduler, one for each group of the optimizer
    interop/wrappers             the name of DistributedDataParallel's
                                 _set_params_and_buffers_to_ignore_for_model, for a message
    layer                        nn.Module._load_from_state_dict: overridden
    op_builder                   cpp_extension._get_build_directory, FileBaton (not in 2.14): where
                                 torch compiles extensions, and how it locks the folder

``op_builder`` runs without the package, when this is installed, and cannot import this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import _VF, Tensor, nn  # ``_VF`` has the ``_foreach`` functions with types
from torch.jit import _trace
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# ---- devices and streams -----------------------------------------------------------------------


def current_cuda_device() -> int:
    """Return the current CUDA device, without initialising CUDA; ``torch._C._cuda_getDevice``."""
    return torch._C._cuda_getDevice()


def current_raw_stream(device: int) -> int:
    """Return the address of a CUDA device's current stream; makes no Python object for it."""
    return torch._C._cuda_getCurrentRawStream(device)


def occupy_gpu(num_cycles: int) -> None:
    """Keep the current stream busy for some clock cycles, so that the host can run ahead."""
    torch.cuda._sleep(num_cycles)


# ---- distributed -------------------------------------------------------------------------------


def default_store() -> Store:
    """Return the key-value store of the default process group, through which ranks agree."""
    return torch.distributed.distributed_c10d._get_default_store()


def symmetric_memory() -> ModuleType:
    """Return ``torch.distributed._symmetric_memory``, where ranks get memory of each other."""
    # Imported when it is needed: builds without CUDA need not have it.
    import torch.distributed._symmetric_memory as found

    return found


def active_ddp() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward is running."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


# What FSDP, in both versions, notes on the modules it manages, for torch.compile.
FSDP_MARK = "_is_fsdp_managed_module"

# ---- autograd and tensors ----------------------------------------------------------------------


def is_in_backward() -> bool:
    """Return whether a backward is running, as when activation checkpointing runs a forward."""
    return torch._C._current_graph_task_id() != -1


# ``__torch_function__`` of a tensor subclass whose operations return plain tensors.
plain_torch_function: Any = torch._C._disabled_torch_function_impl


def norms_of(
    tensors: Sequence[Tensor], order: float, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Return the norm of each tensor, 0-dim, by one launch for many; summed up in ``dtype``."""
    return list(_VF._foreach_norm(list(tensors), order, dtype=dtype))


def multiply_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors in place, by one launch for many; a factor may be a 0-dim tensor."""
    _VF._foreach_mul_(list(tensors), factor)


# torch.utils.dlpack.to_dlpack and torch.jit.is_tracing, which type checkers take for private.
to_dlpack = torch._C._to_dlpack
is_jit_tracing = _trace.is_tracing


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a context in which new tensors have a shape and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


# ---- modules -----------------------------------------------------------------------------------

# Attributes of a module that hold its hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks on all modules, such as torch.utils.flop_counter's.
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward or backward hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def uncompiled(function: Any) -> Any:
    """Return the function that ``torch.compile`` has wrapped; others as they are."""
    return getattr(function, "_torchdynamo_orig_callable", function)
