# SPDX-License-Identifier: Apache-2.0
"""Whether experts' parameters can be stacked, and how a stack and its holder are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# The size, in elements, at which DeepSpeed splits an optimizer's group of experts (moe/utils.py).
MAX_GROUP_NUMEL = 178_956_971


def why_not_stackable(experts: Sequence[nn.Module]) -> str | None:
    """Return why the parameters of a layer's experts cannot be stacked, None if they can."""
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
                return f"{name} has {param.dim()} dimensions, more than a stack can have"
            if id(param) in seen:
                return f"{name} is the same parameter in several experts"
            seen.add(id(param))
    return _why_not_reachable(experts[0]) or _why_not_converted(experts[0])


def _why_not_converted(expert: nn.Module) -> str | None:
    """Return which module of an expert overrides ``_apply``, None if none does.

    It may convert its parameters in its own way, for example keep them fp32 in a bf16 model, but a
    stack is converted with the layer.
    """
    for module in expert.modules():
        if type(module)._apply is not nn.Module._apply and not isinstance(module, nn.RNNBase):
            return f"{type(module).__name__} has an _apply of its own"
    return None


def _why_not_reachable(expert: nn.Module) -> str | None:
    """Return which other attribute of a module refers to its parameters, None if there is none.

    An nn.LSTM has a list of them, for example. It would go on using the parameters that the stack
    has replaced.
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


class StackHolder(nn.Module):
    """Holds the stacks of one submodule of the experts, under the names of its parameters.

    ``state_dict()`` does not list stacks, because the experts' modules save and load their views.
    A dictionary made from ``named_parameters()`` does list them and can be loaded.
    """

    def _save_to_state_dict(self, *args: Any) -> None:
        pass

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, [], *args)


def holder_name(path: str) -> str:
    """Return the name of the module that holds the stacks of a submodule of the experts.

    The name contains "deepspeed_experts" and the submodule's path, so that rules which match
    parameters by name still match. It does not end in the submodule's name, because tools that
    replace modules by name would replace the holder.
    """
    return "_".join(["deepspeed_experts", path.replace(".", "__"), "stacked"])


def make_stack(params: Sequence[nn.Parameter]) -> nn.Parameter:
    """Return a stack with copies of the experts' parameters.

    Args:
        params: of equal shape, one of each local expert.

    Returns:
        [El, *shape], or [El * n] for vectors [n].
    """
    data = torch.stack([param.data for param in params])
    if params[0].dim() < 2:
        data = data.flatten()
    return nn.Parameter(data, any(param.requires_grad for param in params))


def set_attributes(stack: nn.Parameter, params: Sequence[nn.Parameter]) -> None:
    """Set a stack's attributes: the first parameter's tags, and which experts are frozen."""
    vars(stack).update(vars(params[0]))
    if frozen := {i for i, param in enumerate(params) if not param.requires_grad}:
        vars(stack)["_frozen_experts"] = frozen if stack.requires_grad else set()
    if stack.numel() > MAX_GROUP_NUMEL:
        # DeepSpeed sums ds_numel where it splits groups, and would leave an empty group before a
        # parameter that is larger than the limit.
        vars(stack)["ds_numel"] = MAX_GROUP_NUMEL
