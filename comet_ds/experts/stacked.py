# SPDX-License-Identifier: Apache-2.0
"""Stacked expert parameters: one nn.Parameter for each matrix of all local experts.

A rank with 64 experts of three matrices has 3 parameters per layer instead of 192, so autograd,
ZeRO and the optimizer have a 64th of the parameters to handle. The user's expert modules stay; the
``weight`` of each becomes a view of the stack:

    experts.deepspeed_experts_fc1_stacked.weight  [El, F, H]  the parameter, in named_parameters()
    experts.deepspeed_experts.3.fc1.weight        [F, H]      expert 3's view, in state_dict()

El is the number of local experts. Vectors are stacked in one dimension, ``[El * n]``, because rules
that go by the number of dimensions (weight decay, Muon) must not take a stack of biases for a
matrix.

torch looks parameters up in ``module._parameters``. In a stacked expert's module that dictionary is
a ``ViewDict``. It returns an ``ExpertView``, made on access, for the name of a stacked parameter,
and leaves these names out of iteration. The methods of an expert that list parameters are wrapped
to include the views, so ``expert.parameters()`` and ``state_dict()`` return the same names and
shapes as for unstacked experts.

Copies (deepcopy, pickle) hold unstacked parameters, and are stacked again if all experts of a layer
are copied. So a pickle has the same content as DeepSpeed's, and a single expert can be copied.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.moe.experts import Experts
from torch import Tensor, nn

from comet_ds._compat.deepspeed import warn_once
from comet_ds.experts.expert_view import REMEDY, ExpertView, frozen_experts, tags_of
from comet_ds.experts.stackable import (
    StackHolder,
    holder_name,
    make_stack,
    set_attributes,
    why_not_stackable,
)
from comet_ds.experts.unstacked import Unstacked
from comet_ds.experts.views import ViewDict, unwrap_methods, wrap_methods

# Attributes of StackedExperts that are not copied.
_NOT_COPIED = {
    "shapes", "view_modules", "_places", "_listed", "_unbound", "_is_applying", "_pickled",
}  # fmt: skip


class StackedExperts(Experts):
    """DeepSpeed's ``Experts`` with one parameter for each matrix of all local experts.

    Args:
        expert: module; copied for every local expert.
        num_local_experts: number of experts of this rank, El.
        expert_group_name: DeepSpeed's name of the expert parallel group.
        stack: False keeps one parameter per expert.

    Attributes beyond DeepSpeed's:
        shapes: shape of one expert's parameter, by key. A key is the parameter's name in the expert
            module, such as "fc1.weight". Empty if the experts are not stacked.
        reason: why the experts are not stacked; None if they are.
        view_modules: modules that have views, or a child with views.
    """

    def __init__(
        self,
        expert: nn.Module,
        num_local_experts: int,
        expert_group_name: str | None = None,
        *,
        stack: bool = True,
    ) -> None:
        super().__init__(expert, num_local_experts, expert_group_name)
        self._reset()
        experts = list(self.deepspeed_experts)
        self.reason = why_not_stackable(experts) if stack else "stack_experts is false"
        if self.reason is None:
            self._stack([{name: name for name, _ in e.named_parameters()} for e in experts])
        elif stack:
            warn_once(f"comet_ds: one parameter per expert: {self.reason}")

    def _reset(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.view_modules: list[nn.Module] = []
        self._places: dict[str, tuple[str, str]] = {}  # by key: name of the holder, name in it
        self._listed: dict[tuple[str, int], ExpertView] | None = None  # not None inside listing()
        self._unbound: dict[str, tuple[Tensor, ...]] | None = None  # not None inside unbound()
        self._is_applying = False
        self._pickled: Any = weakref.WeakValueDictionary()  # see view_for_pickle

    @property
    def is_stacked(self) -> bool:
        """Whether the experts' parameters are stacked."""
        return bool(self.shapes)

    def stack(self, key: str) -> nn.Parameter:
        """Return the stack of a key of ``shapes``: [El, *shape], or [El * n] for vectors."""
        parameters, name = self.slot(key)
        return parameters[name]

    def slot(self, key: str) -> tuple[dict[str, Any], str]:
        """Return the dictionary that holds a stack, and the stack's name in it."""
        holder, name = self._places[key]
        module = self._modules[holder]
        assert module is not None, "_stack put it there"
        return module._parameters, name

    def stacks(self) -> dict[str, nn.Parameter]:
        """Return all stacks by key."""
        return {key: self.stack(key) for key in self.shapes}

    def _shape(self, key: str) -> tuple[int, ...]:
        return self.num_local_experts, *self.shapes[key]

    # ---- views, for ``ViewDict`` ---------------------------------------------------------------

    def view(self, key: str, index: int) -> ExpertView:
        """Return one expert's view of a stack."""
        return ExpertView.of(self.stack(key), self._shape(key), index)

    def lookup(self, key: str, index: int) -> Tensor:
        """Return the tensor for an expert's module that reads its parameter."""
        return self.view(key, index) if self._unbound is None else self._unbound[key][index]

    @property
    def is_listing(self) -> bool:
        """Whether a method that iterates over an expert's parameters is running."""
        return self._listed is not None

    @contextlib.contextmanager
    def listing(self) -> Iterator[None]:
        """Make iteration over the experts' parameters include the views."""
        before = self._listed
        self._listed = {} if before is None else before
        try:
            yield
        finally:
            self._listed = before

    def listed_view(self, key: str, index: int) -> ExpertView:
        """Return the view for ``listing``: one object each, so that tied ones are listed once."""
        listed = self._listed
        assert listed is not None, "listing() comes first"
        if (key, index) not in listed:
            listed[key, index] = self.view(key, index)
        return listed[key, index]

    def view_for_pickle(self, key: str, index: int) -> nn.Parameter:
        """Return the parameter to pickle: one object each, so that tied parameters stay tied."""
        if (param := self._pickled.get((key, index))) is None:
            param = self._pickled[key, index] = self.view(key, index).as_parameter()
        return param

    def assign(self, key: str, index: int, value: Tensor) -> None:
        """Take an expert's values, device and dtype from a state_dict (``assign=True``)."""
        stack = self.stack(key)
        if (stack.device, stack.dtype) != (value.device, value.dtype):
            data = torch.empty_like(stack, device=value.device, dtype=value.dtype)
            if not stack.is_meta:
                data.copy_(stack.data)
            stack = nn.Parameter(data, stack.requires_grad)
            self._replace(key, stack)
        stack.data.view(self._shape(key))[index].copy_(value)

    def _replace(self, key: str, stack: nn.Parameter) -> None:
        """Replace a stack by another parameter, which gets its tags."""
        parameters, name = self.slot(key)
        vars(stack).update(vars(parameters[name]))
        parameters[name] = stack

    # ---- for the layer -------------------------------------------------------------------------

    @contextlib.contextmanager
    def unbound(self) -> Iterator[None]:
        """Make all views of a stack in one split while the experts' modules run.

        Autograd then has one node per stack instead of one per view.
        """
        self._unbound = {key: self._split(key) for key in self.shapes}
        try:
            yield
        finally:
            self._unbound = None

    def _split(self, key: str) -> tuple[Tensor, ...]:
        """Return a stack's tensors by expert; unlike views, they may be changed in place."""
        stack, shape = self.stack(key), self.shapes[key]
        if not shape:
            return stack.unbind()
        length, *others = shape
        flat = stack.flatten(0, 1) if others else stack
        return torch.unsafe_split_with_sizes(flat, [length] * self.num_local_experts)

    def partly_frozen(self) -> dict[str, list[int]]:
        """Return, by key, the experts whose part of a stack is frozen while others' are not."""
        return {k: sorted(found) for k in self.shapes if (found := frozen_experts(self.stack(k)))}

    def check_frozen(self) -> None:
        """Refuse stacks that are frozen for some of the experts only.

        Raises:
            ValueError: names the parameter and the experts.
        """
        for key, indices in self.partly_frozen().items():
            raise ValueError(
                f"{key} must be frozen in all local experts or in none, because they are one "
                f"parameter, got {indices} of {self.num_local_experts} frozen; {REMEDY}"
            )

    # ---- stacking and unstacking ---------------------------------------------------------------

    def _stack(self, names: Sequence[Mapping[str, str]]) -> None:
        """Stack the experts' parameters.

        Args:
            names: for each expert, its parameters' names by the key of their stack.
        """
        experts = list(self.deepspeed_experts)
        holders: dict[str, StackHolder] = {}
        key_of: list[dict[int, str]] = [{} for _ in experts]
        for key in names[0]:
            params = [e.get_parameter(own[key]) for e, own in zip(experts, names, strict=True)]
            for keys, param in zip(key_of, params, strict=True):
                keys[id(param)] = key
            path, _, leaf = key.rpartition(".")
            holder = holders.setdefault(holder_name(path), StackHolder())
            holder.register_parameter(leaf, make_stack(params))
            # Looked up, because tools that make empty models put another in its place.
            set_attributes(holder.get_parameter(leaf), params)
            self._places[key], self.shapes[key] = (holder_name(path), leaf), tuple(params[0].shape)
        for index, expert in enumerate(experts):
            for module in expert.modules():
                self._replace_parameters(module, index, key_of[index])
        self.view_modules = list(self.deepspeed_experts.modules())
        for module in self.view_modules:
            wrap_methods(module)
        self._modules = {**holders, **self._modules}

    def _replace_parameters(self, module: nn.Module, index: int, key_of: dict[int, str]) -> None:
        """Replace the parameters of one module of an expert by views.

        Args:
            module: the module.
            index: the expert's local index.
            key_of: the stack's key by id of a parameter.
        """
        own = module._parameters
        if keys := {name: key_of[id(p)] for name, p in own.items() if id(p) in key_of}:
            module.__dict__["_parameters"] = ViewDict(own, self, index, keys)

    def _view_names(self) -> list[dict[str, str]]:
        """Return, for each expert, the present names of its views by the key of their stack."""
        found: list[dict[str, str]] = [{} for _ in self.deepspeed_experts]
        for index, expert in enumerate(self.deepspeed_experts):
            for path, module in expert.named_modules():
                own = module._parameters
                if isinstance(own, ViewDict) and (own.experts, own.index) == (self, index):
                    for name, key in own.stack_keys.items():
                        found[index][key] = f"{path}.{name}".lstrip(".")
        return found

    def _why_incomplete(self, names: Sequence[Mapping[str, str]]) -> str | None:
        """Return which expert has lost a view because a module was replaced; None if none has."""
        for index, own in enumerate(names):
            if missing := [key for key in self.shapes if key not in own]:
                return f"the module of {missing[0]} was replaced in expert {index}"
        return None

    def unstack_if_replaced(self) -> None:
        """Unstack if a module with views was replaced in some expert."""
        if why := self._why_incomplete(self._view_names()):
            self.unstack(why)

    def unstack(self, why: str, *, log: bool = True) -> None:
        """Give every expert its own parameters again.

        An optimizer that still holds the stacks would train nothing: ``unstacked_parameters``
        returns the parameters that replace them.

        Args:
            why: the reason, for the log and for ``reason``.
            log: whether to print a warning.
        """
        if not self.is_stacked:
            return
        if log:
            warn_once(f"comet_ds: one parameter per expert from now on: {why}")
        params: dict[tuple[str, int], nn.Parameter] = {}
        for key, stack in self.stacks().items():
            for index in range(self.num_local_experts):
                params[key, index] = self.view(key, index).copy_parameter()
                vars(params[key, index]).update(tags_of(stack))
        for module in self.view_modules:
            unwrap_methods(module)
            if isinstance(own := module._parameters, ViewDict):
                plain = own.with_views(lambda key, index=own.index: params[key, index])
                module.__dict__["_parameters"] = plain
        in_use = {id(p) for p in self.deepspeed_experts.parameters()}
        for key, stack in self.stacks().items():
            made = [params[key, index] for index in range(self.num_local_experts)]
            kept = [p if id(p) in in_use else None for p in made]
            vars(stack)["_unstacked"] = Unstacked(self, kept)
        for holder in {holder for holder, _ in self._places.values()}:
            del self._modules[holder]
        self._reset()
        self.reason = why

    # ---- conversions and copies ----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> StackedExperts:
        tags = {key: dict(vars(stack)) for key, stack in self.stacks().items()}
        self._is_applying = True
        try:
            super()._apply(fn, recurse)
        finally:
            self._is_applying = False
        for key, stack in self.stacks().items():  # torch may have made new parameters without tags
            vars(stack).update(tags[key])
        return self

    def check_conversion(self, fn: Any) -> None:
        """Refuse to convert a single expert, whose stack would not be converted.

        Args:
            fn: the function that ``nn.Module._apply`` applies to each parameter.

        Raises:
            RuntimeError: ``fn`` changes the dtype or device, and the call is not for the whole
                layer.
        """
        for stack in self.stacks().values() if not self._is_applying else ():
            probe = stack.data.new_empty(0)
            made = fn(probe)
            if (made.dtype, made.device) != (probe.dtype, probe.device):
                raise RuntimeError(
                    f"an expert cannot be converted by itself, from {probe.dtype} on "
                    f"{probe.device} to {made.dtype} on {made.device}: its parameters are views of "
                    f"stacks; convert the whole layer, or {REMEDY}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of unstacked experts, and the names of the parameters to stack."""
        holders = {holder for holder, _ in self._places.values()}
        modules = {name: m for name, m in self._modules.items() if name not in holders}
        state = {k: v for k, v in self.__dict__.items() if k not in _NOT_COPIED}
        names = self._view_names()
        reason = self.reason or self._why_incomplete(names)
        return {**state, "_modules": modules, "reason": reason, "_names_to_stack": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("_names_to_stack")
        super().__setstate__(state)
        self._reset()
        if self.reason is None:
            self._stack(names)

    def __deepcopy__(self, memo: dict[Any, Any]) -> StackedExperts:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for key in made.shapes:  # a copied optimizer must hold the copied model's stacks
            stack = memo.setdefault(id(self.stack(key)), made.stack(key))
            if stack is not made.stack(key):
                made._replace(key, stack)
        return made
