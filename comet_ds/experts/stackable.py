# SPDX-License-Identifier: Apache-2.0
"""Which parameters ``stacked.py`` can stack, and a stack of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Where DeepSpeed splits an optimizer's group of experts (moe/utils.py), in elements.
MAX_GROUP_NUMEL = 178_956_971


def why_not_stackable(experts: Sequence[nn.Module]) -> str | None:
    """Return why the parameters of a layer's experts cannot be stacked, None where they can."""
    first = dict(experts[0].named_parameters())
    if not first:
        return "the experts have no parameters"
    seen: set[int] = set()
    for expert in experts:
        params = dict(expert.named_parameters())
        if list(params) != list(first):
            return "the experts differ in their parameters"
        for name, param in params.items():
            other = first[name]
            if type(param) is not nn.Parameter:
                return f"{name} is a {type(param).__name__}"
            if (param.shape, param.dtype) != (other.shape, other.dtype):
                return f"{name} differs in shape or dtype between experts"
            if param.dim() > 2:
                return f"{name} has {param.dim()} dimensions, optimizers that work on matrices mind"
            if id(param) in seen:
                return f"{name} is the same parameter in several experts"
            seen.add(id(param))
    return _why_not_reachable(experts[0]) or _why_not_converted(experts[0])


def _why_not_converted(expert: nn.Module) -> str | None:
    """Return which module of an expert converts its parameters by itself, None if none does.

    Such as one that keeps fp32 in a bf16 model; stacks are converted with the layer.
    """
    for module in expert.modules():
        if type(module)._apply is not nn.Module._apply and not isinstance(module, nn.RNNBase):
            return f"{type(module).__name__} has an _apply of its own"
    return None


def _why_not_reachable(expert: nn.Module) -> str | None:
    """Return which attribute of a module holds a parameter besides ``_parameters``, None if none.

    Such as the list of an nn.LSTM. It would keep what the stack has replaced.
    """
    params = {id(p) for p in expert.parameters()}
    for path, module in expert.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            values = value.values() if isinstance(value, dict) else value
            values = values if isinstance(value, list | tuple | set | dict) else ()
            if any(id(v) in params for v in (value, *values)):
                return f"{path or type(module).__name__}.{name} holds parameters as well"
    return None


def holder_name(path: str) -> str:
    """Return the name of the module that holds the stacks of an expert's module.

    Rules by name find in it what DeepSpeed's names have, and the parameter's name after it. It does
    not end in the name of the expert's module: tools that replace modules would take it for one.
    """
    return "_".join(["deepspeed_experts", path.replace(".", "__"), "stacked"])


def stack_rows(rows: Sequence[nn.Parameter]) -> nn.Parameter:
    """Return the stack of equally shaped parameters."""
    data = torch.stack([row.data for row in rows])
    if rows[0].dim() < 2:
        data = data.flatten()
    return nn.Parameter(data, any(row.requires_grad for row in rows))


def set_attributes(stack: nn.Parameter, rows: Sequence[nn.Parameter]) -> None:
    """Give a stack the tags of its first row, and what DeepSpeed and ``Row`` look for."""
    stack.__dict__.update(rows[0].__dict__)
    if frozen := {i for i, row in enumerate(rows) if not row.requires_grad}:
        stack._frozen_rows = frozen if stack.requires_grad else set()
    if stack.numel() > MAX_GROUP_NUMEL:
        # DeepSpeed counts this where it splits groups, and would leave an empty one before a
        # parameter that is larger than a group may be.
        stack.ds_numel = MAX_GROUP_NUMEL
