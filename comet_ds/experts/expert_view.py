# SPDX-License-Identifier: Apache-2.0
"""ExpertView: one expert's view of a stacked parameter, in the place of its own parameter."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from comet_ds._compat.torch import plain_torch_function, to_dlpack

REMEDY = 'set "stack_experts" to false to keep one parameter per expert'

# Attributes of a stack that are not tags of its views.
_OF_STACKS = ("_frozen_experts", "_unstacked", "ds_numel")


class ExpertView(torch.Tensor):
    """One expert's view of a stack: the value of ``expert.fc1.weight``, for example.

    It passes for an nn.Parameter, except that it is not a leaf. Attributes that are set on it, such
    as DeepSpeed's tags, are set on the stack; ``data`` and ``grad`` are views of the stack's.
    """

    __torch_function__ = plain_torch_function
    _is_param = True  # makes isinstance(view, nn.Parameter) true
    is_leaf = False

    _OWN = ("_stack", "_shape", "_index")

    @staticmethod
    def of(stack: nn.Parameter, shape: tuple[int, ...], index: int) -> ExpertView:
        """Make a view.

        Args:
            stack: the stacked parameter.
            shape: [El, *shape of one expert's parameter].
            index: local index of the expert.
        """
        with torch.enable_grad():
            view = stack.view(shape)[index].as_subclass(ExpertView)
        vars(view).update(_stack=stack, _shape=shape, _index=index)
        return view

    def __getattr__(self, name: str) -> Any:
        if name in ExpertView._OWN or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_stack"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad", "requires_grad"):
            super().__setattr__(name, value)
        else:
            setattr(self._stack, name, value)

    def _part(self, tensor: Tensor) -> Tensor:
        return tensor.view(self._shape)[self._index]

    @property
    def data(self) -> Tensor:
        return _with_own_storage(self._part(self._stack.data))

    @data.setter
    def data(self, value: Tensor) -> None:
        own = self.data
        if (value.shape, value.dtype, value.device) != (own.shape, own.dtype, own.device):
            raise RuntimeError(
                f"an expert's parameter is a view of a stack and stays {tuple(own.shape)}, "
                f"{own.dtype} on {own.device}, got {tuple(value.shape)}, {value.dtype} on "
                f"{value.device}: convert the whole layer, or {REMEDY}"
            )
        own.copy_(value)

    @property
    def grad(self) -> Tensor | None:
        return None if self._stack.grad is None else self._part(self._stack.grad)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if self._stack.grad is None and value is not None:
            self._stack.grad = torch.zeros_like(self._stack)
        if self._stack.grad is not None:
            part = self._part(self._stack.grad)
            part.zero_() if value is None else part.copy_(value)

    @property
    def requires_grad(self) -> bool:
        return self._stack.requires_grad and self._index not in frozen_experts(self._stack)

    @requires_grad.setter
    def requires_grad(self, is_required: bool) -> None:
        num_experts = self._shape[0]
        is_trained = self._stack.requires_grad
        frozen = set(frozen_experts(self._stack) if is_trained else range(num_experts))
        (frozen.discard if is_required else frozen.add)(self._index)
        self._stack.requires_grad_(len(frozen) < num_experts)
        self._stack._frozen_experts = frozen if self._stack.requires_grad else set()

    def requires_grad_(self, requires_grad: bool = True) -> ExpertView:
        self.requires_grad = requires_grad
        return self

    @property
    def retains_grad(self) -> NoReturn:
        # torch.optim reads this of a tensor that is not a leaf, before it refuses it.
        raise ValueError(
            "an optimizer cannot take the parameters of single experts, which are views of stacks: "
            f"give it the model's or the layer's parameters, or {REMEDY}"
        )

    @property
    def grad_fn(self) -> NoReturn:
        # nn.Module reads this of a parameter to register, before it refuses it.
        raise RuntimeError(
            "an expert's parameter cannot be another module's as well, because it is a view of a "
            f"stack: register nn.Parameter(weight.detach().clone()), or {REMEDY}"
        )

    def register_hook(self, hook: Any) -> NoReturn:
        raise RuntimeError(
            "an expert's parameter has no gradient of its own: put the hook on its stack, the "
            f"parameter of shape {tuple(self._stack.shape)} in the layer's named_parameters(), "
            f"or {REMEDY}"
        )

    register_post_accumulate_grad_hook = register_hook

    def detach(self) -> Tensor:
        """Return the view without gradient, as ``state_dict()`` holds it."""
        return self.data

    def copy_parameter(self) -> nn.Parameter:
        """Return an independent copy, without tags, as a copied nn.Parameter has none."""
        return nn.Parameter(self.data.clone(), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return self.copy_parameter()

    def __repr__(self) -> str:
        return repr(self.as_parameter())

    def as_parameter(self) -> nn.Parameter:
        """Return an nn.Parameter that shares the stack's memory and has its tags, to pickle."""
        param = nn.Parameter(self.data, self.requires_grad)
        vars(param).update(tags_of(self._stack))
        return param

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.as_parameter().__reduce_ex__(protocol)


def _with_own_storage(part: Tensor) -> Tensor:
    """Return a tensor of the same memory whose storage spans exactly this part.

    A view has the storage of the whole stack, which would be copied or saved with it.
    """
    return part if part.is_meta else from_dlpack(to_dlpack(part))


def tags_of(stack: nn.Parameter) -> dict[str, Any]:
    """Return the attributes that were set on a stack; its views have the same."""
    return {name: value for name, value in stack.__dict__.items() if name not in _OF_STACKS}


def frozen_experts(stack: nn.Parameter) -> frozenset[int] | set[int]:
    """Return the experts that are frozen in a stack that requires grad."""
    return getattr(stack, "_frozen_experts", frozenset())
