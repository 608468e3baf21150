# SPDX-License-Identifier: Apache-2.0
"""Stacked expert parameters: one nn.Parameter for each matrix of all local experts.

A rank with 64 experts of three matrices has 3 parameters a layer instead of 192, so autograd, ZeRO
and the optimizer do a 64th of the work. The user's expert modules stay, and what they call their
``weight`` becomes a view of the stack:

    experts.deepspeed_experts_fc1_stacked.weight  [El, F, H]  the parameter, in named_parameters()
    experts.deepspeed_experts.3.fc1.weight        its row 3 [F, H], in state_dict()

El is the number of local experts. Vectors are stacked in one dimension, ``[El * n]``, because rules
that go by the number of dimensions (weight decay, Muon) must not take a stack of biases for a
matrix.

torch looks parameters up in ``module._parameters``. In a stacked module that dictionary is a
``RowDict``: it answers to a stacked name with a ``Row``, a view made on access, and leaves it out
when it is iterated over. The methods of an expert that list parameters are wrapped to show the
rows, so ``expert.parameters()`` and ``state_dict()`` are what they are for unstacked experts.

Copies (deepcopy, pickle) are made of unstacked experts, and stacked again where all experts of a
layer are copied: a file has DeepSpeed's bytes, and one expert can be copied by itself.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from deepspeed.moe.experts import Experts
from deepspeed.utils import logger
from torch import Tensor, nn

from comet_ds.experts.stackable import holder_name, set_attributes, stack_rows, why_not_stackable
from comet_ds.experts.views import (
    REMEDY,
    Row,
    RowDict,
    frozen_rows,
    tags_of,
    unwrap_methods,
    wrap_methods,
)

# Attributes of StackedExperts that copies make anew.
_OF_STACKING = {"shapes", "row_modules", "_places", "_listed", "_live", "_is_applying", "_in_file"}


class StackHolder(nn.Module):
    """Holds the stacks of one module of an expert, by that module's names.

    ``state_dict()`` does not list them: the experts' modules save and load their rows. What was
    saved from ``named_parameters()`` has them, and can be loaded.
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


class StackedExperts(Experts):
    """DeepSpeed's ``Experts`` with one parameter for each matrix of all local experts.

    Args:
        expert: module; copied for every local expert.
        num_local_experts: El.
        expert_group_name: tag for DeepSpeed.
        stack: False leaves one parameter per expert.

    Attributes beyond DeepSpeed's:
        shapes: shape of a row of each stack, by key: the parameter's name in the expert's module,
            such as "fc1.weight". Empty where the experts are not stacked.
        reason: why they are not, None where they are.
        row_modules: all modules that have got rows, or a child with rows.
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
        experts = self.deepspeed_experts
        self.reason = why_not_stackable(experts) if stack else "stack_experts is false"
        if self.reason is None:
            self._stack([{name: name for name, _ in e.named_parameters()} for e in experts])
        elif stack:
            _warn(f"one parameter per expert: {self.reason}")

    def _reset(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.row_modules: list[nn.Module] = []
        self._places: dict[str, tuple[str, str]] = {}  # of each stack: its holder and name there
        self._listed: dict[tuple[str, int], Row] | None = None  # while a method lists rows
        self._live: dict[str, tuple[Tensor, ...]] | None = None  # rows of the forward under way
        self._is_applying = False
        self._in_file: Any = weakref.WeakValueDictionary()  # what a pickler has been given

    @property
    def is_stacked(self) -> bool:
        return bool(self.shapes)

    def stack(self, key: str) -> nn.Parameter:
        """Return the stack of a key of ``shapes``: [El, *shape], [El * n] for vectors."""
        parameters, name = self.slot(key)
        return parameters[name]

    def slot(self, key: str) -> tuple[dict[str, Any], str]:
        """Return the dictionary that holds a stack, and its name there."""
        holder, name = self._places[key]
        return self._modules[holder]._parameters, name

    def stacks(self) -> dict[str, nn.Parameter]:
        """Return all stacks by key."""
        return {key: self.stack(key) for key in self.shapes}

    def _shape(self, key: str) -> tuple[int, ...]:
        return self.num_local_experts, *self.shapes[key]

    # ---- rows, for ``RowDict`` -----------------------------------------------------------------

    def row(self, key: str, index: int) -> Row:
        """Return one expert's row of a stack."""
        return Row.of(self.stack(key), self._shape(key), index)

    def find_row(self, key: str, index: int) -> Tensor:
        """Return what an expert's module gets when it looks up its parameter."""
        return self.row(key, index) if self._live is None else self._live[key][index]

    @property
    def is_listing(self) -> bool:
        """Whether a method is under way that goes through an expert's parameters."""
        return self._listed is not None

    @contextlib.contextmanager
    def listing(self) -> Iterator[None]:
        """While a method goes through experts' parameters: the rows are listed."""
        before = self._listed
        self._listed = {} if before is None else before
        try:
            yield
        finally:
            self._listed = before

    def list_row(self, key: str, index: int) -> Row:
        """Return a row for such a method: always the same, so that tied ones are listed once."""
        if (key, index) not in self._listed:
            self._listed[key, index] = self.row(key, index)
        return self._listed[key, index]

    def row_in_file(self, key: str, index: int) -> nn.Parameter:
        """Return a row for a pickler: always the same, so that tied ones stay tied."""
        if (param := self._in_file.get((key, index))) is None:
            param = self._in_file[key, index] = self.row(key, index).in_file()
        return param

    def assign(self, key: str, index: int, value: Tensor) -> None:
        """Take a row's values, device and dtype from a state_dict (``assign=True``)."""
        stack = self.stack(key)
        if (stack.device, stack.dtype) != (value.device, value.dtype):
            data = torch.empty_like(stack, device=value.device, dtype=value.dtype)
            if not stack.is_meta:
                data.copy_(stack.data)
            stack = nn.Parameter(data, stack.requires_grad)
            self._replace(key, stack)
        stack.data.view(self._shape(key))[index].copy_(value)

    def _replace(self, key: str, stack: nn.Parameter) -> None:
        """Put another parameter in a stack's place; it gets the tags of the one that was there."""
        parameters, name = self.slot(key)
        stack.__dict__.update(parameters[name].__dict__)
        parameters[name] = stack

    # ---- for the layer -------------------------------------------------------------------------

    @contextlib.contextmanager
    def unbound(self) -> Iterator[None]:
        """While the experts' modules are called: rows come from one split, with one backward."""
        self._live = {key: self._split(key) for key in self.shapes}
        try:
            yield
        finally:
            self._live = None

    def _split(self, key: str) -> tuple[Tensor, ...]:
        """Return all rows of a stack; unlike views of it, they may be changed in place."""
        stack, shape = self.stack(key), self.shapes[key]
        if not shape:
            return stack.unbind()
        rows = stack.flatten(0, 1) if len(shape) > 1 else stack
        return torch.unsafe_split_with_sizes(rows, [shape[0]] * self.num_local_experts)

    def partly_frozen(self) -> dict[str, list[int]]:
        """Return the keys of stacks of which some rows are frozen, and which."""
        return {k: sorted(rows) for k in self.shapes if (rows := frozen_rows(self.stack(k)))}

    def check_frozen(self) -> None:
        """Refuse stacks of which some rows are frozen.

        Raises:
            ValueError: naming the parameter and the experts.
        """
        for key in self.shapes:
            if not (rows := frozen_rows(self.stack(key))):
                continue
            indices = sorted(rows)
            raise ValueError(
                f"{key} must be frozen in all local experts or in none, because they are one "
                f"parameter, got {indices} of {self.num_local_experts} frozen; {REMEDY}"
            )

    # ---- stacking and unstacking ---------------------------------------------------------------

    def _stack(self, names: Sequence[Mapping[str, str]]) -> None:
        """Stack parameters of the experts.

        Args:
            names: of each expert's parameters, by the keys that their stacks are to have.
        """
        experts = list(self.deepspeed_experts)
        holders: dict[str, StackHolder] = {}
        key_of: list[dict[int, str]] = [{} for _ in experts]
        for key in names[0]:
            rows = [e.get_parameter(own[key]) for e, own in zip(experts, names, strict=True)]
            for keys, row in zip(key_of, rows, strict=True):
                keys[id(row)] = key
            path, _, leaf = key.rpartition(".")
            holder = holders.setdefault(holder_name(path), StackHolder())
            holder.register_parameter(leaf, stack_rows(rows))
            set_attributes(holder._parameters[leaf], rows)
            self._places[key], self.shapes[key] = (holder_name(path), leaf), tuple(rows[0].shape)
        for index, expert in enumerate(experts):
            for module in expert.modules():
                self._hide_rows(module, index, key_of[index])
        self.row_modules = list(self.deepspeed_experts.modules())
        for module in self.row_modules:
            wrap_methods(module)
        self._modules = {**holders, **self._modules}

    def _hide_rows(self, module: nn.Module, index: int, key_of: dict[int, str]) -> None:
        """Replace the parameters of one module of an expert by rows."""
        own = module._parameters
        if keys := {name: key_of[id(p)] for name, p in own.items() if id(p) in key_of}:
            module.__dict__["_parameters"] = RowDict(own, self, index, keys)

    def _names_of_rows(self) -> list[dict[str, str]]:
        """Return the names of each expert's rows by their stacks' keys, as its modules are now."""
        found: list[dict[str, str]] = [{} for _ in self.deepspeed_experts]
        for index, expert in enumerate(self.deepspeed_experts):
            for path, module in expert.named_modules():
                own = module._parameters
                if isinstance(own, RowDict) and (own.experts, own.index) == (self, index):
                    for name, key in own.keys_of_rows.items():
                        found[index][key] = f"{path}.{name}".lstrip(".")
        return found

    def _why_incomplete(self, names: Sequence[Mapping[str, str]]) -> str | None:
        """Return which expert has lost a row, because its module was replaced; None if none."""
        for index, own in enumerate(names):
            if missing := [key for key in self.shapes if key not in own]:
                return f"the module of {missing[0]} was replaced in expert {index}"
        return None

    def unstack_if_replaced(self) -> None:
        """Unstack where some expert has lost a row, because its module was replaced."""
        if why := self._why_incomplete(self._names_of_rows()):
            self.unstack(why)

    def unstack(self, why: str, *, log: bool = True) -> None:
        """Give every expert parameters of its own again.

        An optimizer that holds the stacks would train nothing any more: ``unstacked_parameters``
        says what has taken their place.
        """
        if not self.is_stacked:
            return
        if log:
            _warn(f"one parameter per expert from now on: {why}")
        rows: dict[tuple[str, int], nn.Parameter] = {}
        for key, stack in self.stacks().items():
            for index in range(self.num_local_experts):
                rows[key, index] = self.row(key, index).alone()
                rows[key, index].__dict__.update(tags_of(stack))
        for module in self.row_modules:
            unwrap_methods(module)
            if isinstance(own := module._parameters, RowDict):
                found = own.with_rows(lambda key, index=own.index: rows[key, index])
                module.__dict__["_parameters"] = found
        in_use = {id(p) for p in self.deepspeed_experts.parameters()}
        for key, stack in self.stacks().items():
            own_rows = [rows[key, index] for index in range(self.num_local_experts)]
            stack._unstacked = _Unstacked(self, [p if id(p) in in_use else None for p in own_rows])
        for holder in {holder for holder, _ in self._places.values()}:
            del self._modules[holder]
        self._reset()
        self.reason = why

    # ---- conversions and copies ----------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> StackedExperts:
        tags = {key: dict(stack.__dict__) for key, stack in self.stacks().items()}
        self._is_applying = True
        try:
            super()._apply(fn, recurse)
        finally:
            self._is_applying = False
        for key, stack in self.stacks().items():  # what torch makes anew has none
            stack.__dict__.update(tags[key])
        return self

    def check_conversion(self, fn: Any) -> None:
        """Refuse to convert the experts without their stacks.

        Args:
            fn: what ``nn.Module._apply`` is called with.

        Raises:
            RuntimeError: it changes dtype or device, and the stacks are not being converted.
        """
        for stack in self.stacks().values() if not self._is_applying else ():
            probe = stack.data.new_empty(0)
            made = fn(probe)
            if (made.dtype, made.device) != (probe.dtype, probe.device):
                raise RuntimeError(
                    f"an expert cannot be converted by itself, from {probe.dtype} on "
                    f"{probe.device} to {made.dtype} on {made.device}: its parameters are parts of "
                    f"stacks; convert the whole layer, or {REMEDY}"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of unstacked experts, and what to stack."""
        holders = {holder for holder, _ in self._places.values()}
        modules = {name: m for name, m in self._modules.items() if name not in holders}
        state = {k: v for k, v in self.__dict__.items() if k not in _OF_STACKING}
        names = self._names_of_rows()
        reason = self.reason or self._why_incomplete(names)
        return {**state, "_modules": modules, "reason": reason, "_names_of_rows_then": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("_names_of_rows_then")
        super().__setstate__(state)
        self._reset()
        if self.reason is None:
            self._stack(names)

    def __deepcopy__(self, memo: dict[Any, Any]) -> StackedExperts:
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for key in made.shapes:  # an optimizer that is copied with the model holds the same copies
            stack = memo.setdefault(id(self.stack(key)), made.stack(key))
            if stack is not made.stack(key):
                made._replace(key, stack)
        return made


class _Unstacked(NamedTuple):
    """What a stack that is none any more was: of which experts, and what is in its rows' place."""

    experts: StackedExperts | None
    rows: list[nn.Parameter | None]  # None where a replaced module had the row


def unstacked_parameters(params: Sequence[Any]) -> list[Any]:
    """Return a list of parameters with every stack that is none any more replaced by its rows.

    Rows are in the order of ``experts.parameters()``: those of neighbouring stacks of a layer go by
    expert, then by stack.
    """
    found: list[Any] = []
    nothing = _Unstacked(None, [])
    by_layer = itertools.groupby(params, lambda p: getattr(p, "_unstacked", nothing).experts)
    for experts, neighbours in by_layer:
        if experts is None:
            found += neighbours
            continue
        by_expert = zip(*(stack._unstacked.rows for stack in neighbours), strict=True)
        found += [row for rows in by_expert for row in rows if row is not None]
    return found


def _warn(message: str) -> None:
    logger.log_dist_once(f"comet_ds: {message}", ranks=[0], level=logging.WARNING)
