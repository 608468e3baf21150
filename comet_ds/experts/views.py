# SPDX-License-Identifier: Apache-2.0
"""Rows of stacked parameters: what an expert's module has in place of its own parameters.

``stacked.py`` says what stacks are. A module looks a parameter up in ``module._parameters``; in a
stacked expert that is a ``RowDict``, which answers with a ``Row``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack

if TYPE_CHECKING:
    from comet_ds.experts.stacked import StackedExperts

# Modules of torch's data parallel wrappers, and how many calls lie between them and
# ``named_parameters`` at most.
WRAPPERS = ("torch.nn.parallel.", "torch.distributed.fsdp.", "torch.distributed._composable.")
WRAPPER_DEPTH = 4
REMEDY = 'set "stack_experts" to false to keep one parameter per expert'

# Attributes of a stack that are not tags of its rows.
_OF_STACKS = ("_frozen_rows", "_unstacked", "ds_numel")


class Row(torch.Tensor):
    """What an attribute of a stacked expert module gives: one expert's part of a stack.

    Passes for an nn.Parameter, except that it is not a leaf. Attributes that are set on it, such
    as DeepSpeed's tags, are the stack's; ``data`` and ``grad`` are its part of the stack's.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    _is_param = True  # isinstance(row, nn.Parameter)
    is_leaf = False

    _OWN = ("_stack", "_shape", "_index")

    @staticmethod
    def of(stack: nn.Parameter, shape: tuple[int, ...], index: int) -> Row:
        """Return a row of a stack.

        Args:
            stack: the parameter.
            shape: of the stack as rows: [El, *shape of a row].
            index: of the row.
        """
        with torch.enable_grad():
            row = stack.view(shape)[index].as_subclass(Row)
        row.__dict__.update(_stack=stack, _shape=shape, _index=index)
        return row

    def __getattr__(self, name: str) -> Any:
        if name in Row._OWN or name.startswith("__"):
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
                f"an expert's parameter is a part of a stack and stays {tuple(own.shape)}, "
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
        return self._stack.requires_grad and self._index not in frozen_rows(self._stack)

    @requires_grad.setter
    def requires_grad(self, is_required: bool) -> None:
        num_rows = self._shape[0]
        frozen = set(frozen_rows(self._stack) if self._stack.requires_grad else range(num_rows))
        (frozen.discard if is_required else frozen.add)(self._index)
        self._stack.requires_grad_(len(frozen) < num_rows)
        self._stack._frozen_rows = frozen if self._stack.requires_grad else set()

    def requires_grad_(self, requires_grad: bool = True) -> Row:
        self.requires_grad = requires_grad
        return self

    @property
    def retains_grad(self) -> NoReturn:
        # torch.optim asks this of a tensor that is no leaf, and then refuses it.
        raise ValueError(
            "an optimizer cannot take the parameters of single experts, which are parts of stacks: "
            f"give it the model's or the layer's parameters, or {REMEDY}"
        )

    @property
    def grad_fn(self) -> NoReturn:
        # nn.Module asks this of a parameter that it is to register, and then refuses it.
        raise RuntimeError(
            "an expert's parameter cannot be another module's as well, because it is a part of a "
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
        """Return the row without gradient; what ``state_dict()`` holds."""
        return self.data

    def alone(self) -> nn.Parameter:
        """Return a copy as a parameter of its own; without tags, as parameters are copied."""
        return nn.Parameter(self.data.clone(), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return self.alone()

    def __repr__(self) -> str:
        return repr(self.in_file())

    def in_file(self) -> nn.Parameter:
        """Return the row as a file has it: a parameter in the stack's memory, with its tags."""
        param = nn.Parameter(self.data, self.requires_grad)
        param.__dict__.update(tags_of(self._stack))
        return param

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.in_file().__reduce_ex__(protocol)


def _with_own_storage(part: Tensor) -> Tensor:
    """Return the same memory as a tensor whose storage ends where it does.

    A view would take the whole stack with it when it is copied or saved.
    """
    return part if part.is_meta else from_dlpack(to_dlpack(part))


def tags_of(stack: nn.Parameter) -> dict[str, Any]:
    """Return the attributes that have been set on a stack, which are its rows' as well."""
    return {name: value for name, value in stack.__dict__.items() if name not in _OF_STACKS}


def frozen_rows(stack: nn.Parameter) -> frozenset[int] | set[int]:
    """Return which rows of a stack that requires gradient were frozen by themselves."""
    return getattr(stack, "_frozen_rows", frozenset())


class RowDict(dict):
    """``_parameters`` of a stacked expert's module.

    Args:
        parameters: the module's until now; None is in a stacked one's place from now on (torch's
            compiler does not look at the attributes of an empty dictionary).
        experts: of the layer.
        index: of the expert.
        keys: names that are stacked, each with the stack's key.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        experts: StackedExperts,
        index: int,
        keys: dict[str, str],
    ) -> None:
        super().__init__({name: None if name in keys else p for name, p in parameters.items()})
        self.experts, self.index, self.keys_of_rows = experts, index, keys

    def row(self, name: str) -> Tensor:
        return self.experts.find_row(self.keys_of_rows[name], self.index)

    def __getitem__(self, name: str) -> Any:
        return self.row(name) if name in self.keys_of_rows else super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.keys_of_rows:
            super().__setitem__(name, value)
        elif self.experts.is_listing:  # load_state_dict(assign=True)
            self.experts.assign(self.keys_of_rows[name], self.index, value)
        elif value is None or type(value) is nn.Parameter:
            self._unstack(f"{name} of an expert was replaced")[name] = value
        elif not self.is_own(name, value):
            raise RuntimeError(
                f"{name} of an expert is a part of a stack and cannot be exchanged for a while: "
                f"exchange the stack, in the layer's named_parameters(), or {REMEDY}"
            )

    def is_own(self, name: str, value: Any) -> bool:
        """Whether a value is the row that stands under a name."""
        if not isinstance(value, Row) or name not in self.keys_of_rows:
            return False
        stack = self.experts.stack(self.keys_of_rows[name])
        return value._stack is stack and value._index == self.index

    def __delitem__(self, name: str) -> None:
        if name in self.keys_of_rows:
            del self._unstack(f"{name} of an expert was removed")[name]
        else:
            super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self.keys_of_rows:
            return super().pop(name, *default)
        return self._unstack(f"{name} of an expert was removed").pop(name)

    def _unstack(self, why: str) -> dict[str, Any]:
        """Unstack the layer; return the dictionary that the module has now."""
        module = next(m for m in self.experts.row_modules if m._parameters is self)
        self.experts.unstack(why)
        return module._parameters

    def items(self):
        return self._listed().items()

    def keys(self):
        return self._listed().keys()

    def values(self):
        return self._listed().values()

    def plain(self) -> dict[str, Any]:
        """Return what is not stacked."""
        return {name: p for name, p in super().items() if name not in self.keys_of_rows}

    def with_rows(self, row_of: Callable[[str], Any]) -> dict[str, Any]:
        """Return all parameters in order.

        Args:
            row_of: of a stack's key; what is to stand for its row.
        """
        keys = self.keys_of_rows
        return {name: row_of(keys[name]) if name in keys else p for name, p in super().items()}

    def _listed(self) -> dict[str, Any]:
        if not self.experts.is_listing:
            return self.plain()
        return self.with_rows(lambda key: self.experts.list_row(key, self.index))

    def __deepcopy__(self, memo: dict[Any, Any]) -> dict[str, Any]:
        def copied(key: str) -> nn.Parameter:
            place = id(self.experts), key, self.index  # tied parameters stay tied
            if place not in memo:
                memo[place] = self.experts.row(key, self.index).alone()
                memo[id(memo[place])] = memo[place]
            return memo[place]

        return copy.deepcopy(self.with_rows(copied), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.with_rows(lambda key: self.experts.row_in_file(key, self.index)),)


def _owners(module: nn.Module) -> list[StackedExperts]:
    """Return the experts whose rows a module or its children have."""
    dicts = [m._parameters for m in module.modules()]
    return list({id(d.experts): d.experts for d in dicts if isinstance(d, RowDict)}.values())


@contextlib.contextmanager
def _listing(module: nn.Module) -> Iterator[None]:
    """While a method goes through a module's parameters: its rows are listed."""
    with contextlib.ExitStack() as stack:
        for owner in _owners(module):
            stack.enter_context(owner.listing())
        yield


def _is_asked_by_wrapper() -> bool:
    """Whether the caller's caller is of a data parallel wrapper of torch's.

    They go through all modules to find what they find in the model's ``parameters()``, stacks, once
    more: rows would be parameters that are not there.
    """
    frame = sys._getframe(2)
    for _ in range(WRAPPER_DEPTH):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith(WRAPPERS):
            return True
        frame = frame.f_back
    return False


class _Methods:
    """Methods that a stacked expert's modules have in place of their class's."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        with contextlib.nullcontext() if _is_asked_by_wrapper() else _listing(self):
            return iter(list(type(self).named_parameters(self, *args, **kwargs)))

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _listing(self):
            type(self)._save_to_state_dict(self, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _listing(self):
            type(self)._load_from_state_dict(self, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        for owner in _owners(self):
            owner.check_conversion(fn)
        return type(self)._apply(self, fn, *args, **kwargs)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        own = self._parameters
        if isinstance(own, RowDict) and own.is_own(name, param):
            return  # the end of ``module.weight *= 2``
        type(self).register_parameter(self, name, param)


METHODS = {name: method for name, method in vars(_Methods).items() if inspect.isfunction(method)}


def wrap_methods(module: nn.Module) -> None:
    """Let a module's methods see its rows, and those of its children."""
    for name, method in METHODS.items():
        module.__dict__[name] = types.MethodType(method, module)


def unwrap_methods(module: nn.Module) -> None:
    """Undo ``wrap_methods``."""
    for name in METHODS:
        module.__dict__.pop(name, None)


def place_of_row(module: nn.Module, name: str) -> tuple[StackedExperts, str, int] | None:
    """Return the experts, the stack's key and the expert of a module's row; None for a parameter.

    Args:
        module: of an expert.
        name: of its parameter.
    """
    own = module._parameters
    if isinstance(own, RowDict) and name in own.keys_of_rows:
        return own.experts, own.keys_of_rows[name], own.index
    return None


def find_stack(modules: Sequence[nn.Module], name: str) -> nn.Parameter | None:
    """Return the stack whose rows are the parameters of some modules in order, None without one.

    Args:
        modules: the same module of expert 0, 1, ... of a layer, of all its local experts.
        name: of their parameter.
    """
    first = place_of_row(modules[0], name)
    if first is None or len(modules) != first[0].num_local_experts:
        return None
    experts, key, _ = first
    for index, module in enumerate(modules):
        if place_of_row(module, name) != (experts, key, index):
            return None
    return experts.stack(key)
