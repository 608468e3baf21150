# SPDX-License-Identifier: Apache-2.0
"""How a stacked expert's module finds and lists its views of the stacks.

``stacked.py`` explains stacks. A module looks a parameter up in ``module._parameters``; in a
stacked expert that is a ``ViewDict``, which returns an ``ExpertView``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from comet_ds.experts.expert_view import REMEDY, ExpertView

if TYPE_CHECKING:
    from comet_ds.experts.stacked import StackedExperts

# Modules of torch's data parallel wrappers, and the largest number of stack frames between one of
# them and ``named_parameters``.
WRAPPERS = ("torch.nn.parallel.", "torch.distributed.fsdp.", "torch.distributed._composable.")
WRAPPER_DEPTH = 4


class ViewDict(dict):
    """``_parameters`` of a stacked expert's module.

    Args:
        parameters: the module's ``_parameters`` so far. A stacked one is replaced by None and not
            removed, because torch's compiler skips the attributes of an empty dictionary.
        experts: the layer's experts.
        index: local index of the expert.
        keys: key of the stack by name of the parameter, for the stacked ones.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        experts: StackedExperts,
        index: int,
        keys: dict[str, str],
    ) -> None:
        super().__init__({name: None if name in keys else p for name, p in parameters.items()})
        self.experts, self.index, self.stack_keys = experts, index, keys

    def view(self, name: str) -> Tensor:
        """Return the expert's view under a stacked name."""
        return self.experts.lookup(self.stack_keys[name], self.index)

    def __getitem__(self, name: str) -> Any:
        return self.view(name) if name in self.stack_keys else super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self.stack_keys:
            super().__setitem__(name, value)
        elif self.experts.is_listing:  # load_state_dict(assign=True)
            self.experts.assign(self.stack_keys[name], self.index, value)
        elif value is None or type(value) is nn.Parameter:
            self._unstack(f"{name} of an expert was replaced")[name] = value
        elif not self.is_own(name, value):
            raise RuntimeError(
                f"{name} of an expert is a view of a stack and cannot be replaced temporarily: "
                f"replace the stack, in the layer's named_parameters(), or {REMEDY}"
            )

    def is_own(self, name: str, value: Any) -> bool:
        """Return whether a value is the expert's view under this name."""
        if not isinstance(value, ExpertView) or name not in self.stack_keys:
            return False
        stack = self.experts.stack(self.stack_keys[name])
        return value._stack is stack and value._index == self.index

    def __delitem__(self, name: str) -> None:
        if name in self.stack_keys:
            del self._unstack(f"{name} of an expert was removed")[name]
        else:
            super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        if name not in self.stack_keys:
            return super().pop(name, *default)
        return self._unstack(f"{name} of an expert was removed").pop(name)

    def _unstack(self, why: str) -> dict[str, Any]:
        """Unstack the layer; return the module's new ``_parameters``."""
        module = next(m for m in self.experts.view_modules if m._parameters is self)
        self.experts.unstack(why)
        return module._parameters

    def items(self):
        return self._listed().items()

    def keys(self):
        return self._listed().keys()

    def values(self):
        return self._listed().values()

    def plain(self) -> dict[str, Any]:
        """Return the parameters that are not stacked."""
        return {name: p for name, p in super().items() if name not in self.stack_keys}

    def with_views(self, view_of: Callable[[str], Any]) -> dict[str, Any]:
        """Return all parameters in order.

        Args:
            view_of: returns the value for a stacked parameter, given the key of its stack.
        """
        keys = self.stack_keys
        return {name: view_of(keys[name]) if name in keys else p for name, p in super().items()}

    def _listed(self) -> dict[str, Any]:
        if not self.experts.is_listing:
            return self.plain()
        return self.with_views(lambda key: self.experts.listed_view(key, self.index))

    def __deepcopy__(self, memo: dict[Any, Any]) -> dict[str, Any]:
        def copied(key: str) -> nn.Parameter:
            place = id(self.experts), key, self.index  # tied parameters stay tied
            if place not in memo:
                memo[place] = self.experts.view(key, self.index).copy_parameter()
                memo[id(memo[place])] = memo[place]
            return memo[place]

        return copy.deepcopy(self.with_views(copied), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.with_views(lambda key: self.experts.view_for_pickle(key, self.index)),)


def _owners(module: nn.Module) -> list[StackedExperts]:
    """Return the ``StackedExperts`` whose views a module or its children have."""
    dicts = [m._parameters for m in module.modules()]
    return list({id(d.experts): d.experts for d in dicts if isinstance(d, ViewDict)}.values())


@contextlib.contextmanager
def _listing(module: nn.Module) -> Iterator[None]:
    """Make iteration over a module's parameters include its views."""
    with contextlib.ExitStack() as stack:
        for owner in _owners(module):
            stack.enter_context(owner.listing())
        yield


def _is_asked_by_wrapper() -> bool:
    """Return whether one of torch's data parallel wrappers called the caller.

    The wrappers look for the model's ``parameters()``, which are stacks, in every module; they must
    not find views, which are not among them.
    """
    frame = sys._getframe(2)
    for _ in range(WRAPPER_DEPTH):
        if frame is None:
            return False
        if frame.f_globals.get("__name__", "").startswith(WRAPPERS):
            return True
        frame = frame.f_back
    return False


class _Methods(nn.Module):
    """Methods that replace those of the class in a stacked expert's modules."""

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
        if isinstance(own, ViewDict) and own.is_own(name, param):
            return  # ``module.weight *= 2`` ends with assigning the view to itself
        type(self).register_parameter(self, name, param)


METHODS = {name: method for name, method in vars(_Methods).items() if inspect.isfunction(method)}


def wrap_methods(module: nn.Module) -> None:
    """Make a module's methods include its views and its children's."""
    for name, method in METHODS.items():
        module.__dict__[name] = types.MethodType(method, module)


def unwrap_methods(module: nn.Module) -> None:
    """Undo ``wrap_methods``."""
    for name in METHODS:
        module.__dict__.pop(name, None)


def place_of_row(module: nn.Module, name: str) -> tuple[StackedExperts, str, int] | None:
    """Return where a module's view belongs, None if the name is a parameter.

    Args:
        module: a module of an expert.
        name: name of its parameter.

    Returns:
        The layer's experts, the key of the stack, the local index of the expert.
    """
    own = module._parameters
    if isinstance(own, ViewDict) and name in own.stack_keys:
        return own.experts, own.stack_keys[name], own.index
    return None


def find_stack(modules: Sequence[nn.Module], name: str) -> nn.Parameter | None:
    """Return the stack whose views are the parameters of some modules, None if there is none.

    Args:
        modules: the same submodule of experts 0, 1, ... of a layer; a stack is found only for all
            its local experts.
        name: name of the parameter.
    """
    first = place_of_row(modules[0], name)
    if first is None or len(modules) != first[0].num_local_experts:
        return None
    experts, key, _ = first
    for index, module in enumerate(modules):
        if place_of_row(module, name) != (experts, key, index):
            return None
    return experts.stack(key)
