# SPDX-License-Identifier: Apache-2.0
"""Which parameter lies where in an optimizer's tensors: stacked here, by expert in a file.

Two layouts of one model are told apart:

    stacked   of this engine: one parameter for each matrix of all local experts of a layer
    native    of an engine whose layers are DeepSpeed's own: one parameter per expert and matrix

Both hold the same elements. Their unit is the native parameter: a stack is a sequence of El of
them. An optimizer that flattens its groups (ZeRO, BF16_Optimizer, FP16_Optimizer) has, with two
experts of two matrices a and b:

    stacked   | a of expert 0 | a of expert 1 | b of expert 0 | b of expert 1 |
    native    | a of expert 0 | b of expert 0 | a of expert 1 | b of expert 1 |

and the optimizer's groups of experts end elsewhere, because DeepSpeed begins a new one where the
next parameter would exceed a limit.

El is the number of local experts. ``flat_groups.py`` has the layout within a flattened group,
``checkpoint_states.py`` and ``checkpoint_flat.py`` convert what optimizers save.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from comet_ds.experts.stacked import StackedExperts
from comet_ds.experts.views import ViewDict


@dataclass(frozen=True, eq=False)
class NativeParameter:
    """A parameter of the native layout.

    Attributes:
        name: in ``state_dict()``.
        shape: of the parameter.
        holder: the model's parameter that is it, or the stack that has it as a row.
        row: of the stack; None where the holder is the parameter.
    """

    name: str
    shape: torch.Size
    holder: nn.Parameter
    row: int | None

    @property
    def allreduce(self) -> bool:
        """Return DeepSpeed's tag, by which it splits an optimizer's groups."""
        return getattr(self.holder, "allreduce", True)

    @property
    def group_name(self) -> str:
        """Return DeepSpeed's tag of an expert's parameter."""
        return self.holder.group_name

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the parameter's part of a tensor that has its holder's shape."""
        return tensor if self.row is None else tensor.reshape(-1, *self.shape)[self.row]


class ParameterTable:
    """Translates lists of a model's parameters into native ones.

    Args:
        module: the model.
        names: of its parameters, as ``named_parameters()`` has them.
    """

    def __init__(self, module: nn.Module, names: Mapping[nn.Parameter, str]) -> None:
        self._names = names
        self._row_names: dict[tuple[int, str, int], str] = {}
        self._owners: dict[int, StackedExperts] = {}  # by id of a stack, or a parameter beside them
        self._keys: dict[int, str] = {}  # of stacks
        # Of a row (key and expert) or the id of a parameter: expert and position in its list.
        self._places: dict[int, dict[Any, tuple[int, int]]] = {}
        for path, child in module.named_modules():
            if isinstance(own := child._parameters, ViewDict):
                for name, key in own.stack_keys.items():
                    row = id(own.experts), key, own.index
                    self._row_names.setdefault(row, f"{path}.{name}" if path else name)
            if isinstance(child, StackedExperts) and child.is_stacked:
                self._add(child)

    def _add(self, experts: StackedExperts) -> None:
        places: dict[Any, tuple[int, int]] = {}
        for index, expert in enumerate(experts.deepspeed_experts):
            for module in expert.modules():
                own = module._parameters
                if isinstance(own, ViewDict):
                    own = own.with_views(lambda key, index=index: (key, index))
                for member in own.values():
                    if member is not None:
                        place = member if isinstance(member, tuple) else id(member)
                        places.setdefault(place, (index, len(places)))
        self._places[id(experts)] = places
        self._owners |= {place: experts for place in places if isinstance(place, int)}
        self._owners |= {id(stack): experts for stack in experts.stacks().values()}
        self._keys |= {id(stack): key for key, stack in experts.stacks().items()}

    def check_current(self) -> None:
        """Check that the stacks are still the model's.

        Raises:
            RuntimeError: an expert's parameter or module has been replaced since.
        """
        for param, name in self._names.items():
            if self.is_stack(param):
                experts, key = self._owners[id(param)], self._keys[id(param)]
                if key not in experts.shapes or experts.stack(key) is not param:
                    raise RuntimeError(
                        f"the optimizer trains {name}, which is not in the model any more "
                        f"({experts.reason}): change experts before deepspeed.initialize"
                    )

    def is_stack(self, param: nn.Parameter) -> bool:
        """Return whether a parameter is a stack."""
        return id(param) in self._keys

    def stack_names(self) -> set[str]:
        """Return the names by which ``named_parameters()`` lists stacks."""
        return {name for param, name in self._names.items() if self.is_stack(param)}

    def name(self, param: nn.Parameter) -> str:
        """Return the name by which ``named_parameters()`` lists a parameter."""
        return self._names[param]

    def rows(self, param: nn.Parameter) -> list[NativeParameter]:
        """Return the native parameters that one of the model's holds, in its own order."""
        if not self.is_stack(param):
            return [NativeParameter(self._names[param], param.shape, param, None)]
        experts, key = self._owners[id(param)], self._keys[id(param)]
        shape = torch.Size(experts.shapes[key])
        names = [self._row_names[id(experts), key, i] for i in range(experts.num_local_experts)]
        return [NativeParameter(name, shape, param, i) for i, name in enumerate(names)]

    def expand(self, params: Iterable[nn.Parameter]) -> list[NativeParameter]:
        """Return what stands in the place of a list of parameters in the native layout.

        Neighbours of one layer come expert by expert, as ``model.parameters()`` lists them. Within
        an expert they have the order of its parameters, unless the list has its stacks in another.
        """
        found: list[NativeParameter] = []
        for owner, run in itertools.groupby(params, lambda p: id(self._owners.get(id(p)))):
            run = list(run)
            natives = [native for param in run for native in self.rows(param)]
            if any(self.is_stack(param) for param in run):
                natives = self._by_expert(natives, self._places[owner])
            found += natives
        return found

    def _by_expert(
        self, natives: list[NativeParameter], places: Mapping[Any, tuple[int, int]]
    ) -> list[NativeParameter]:
        def place(native: NativeParameter) -> tuple[int, int]:
            if native.row is None:
                return places[id(native.holder)]
            return places[self._keys[id(native.holder)], native.row]

        first_rows = [place(native) for native in natives if native.row == 0]
        if first_rows == sorted(first_rows):
            return sorted(natives, key=place)
        return sorted(natives, key=lambda native: place(native)[0])


@dataclass(frozen=True, eq=False)
class Cluster:
    """Neighbouring groups of an optimizer that hold the same elements in both layouts.

    Attributes:
        stacked: the model's parameters in each group of this engine's optimizer.
        native: the native parameters in each group of a native engine's.
    """

    stacked: list[list[nn.Parameter]]
    native: list[list[NativeParameter]]

    @property
    def is_same(self) -> bool:
        """Return whether both layouts are the same, because there are no stacks."""
        return all(native.row is None for group in self.native for native in group)

    def trained(self) -> Cluster:
        """Return the cluster without parameters that are frozen."""
        stacked = [[p for p in group if is_trained(p)] for group in self.stacked]
        native = [[n for n in group if is_trained(n.holder)] for group in self.native]
        return Cluster([g for g in stacked if g], [g for g in native if g])


def is_trained(param: nn.Parameter) -> bool:
    """Return whether DeepSpeed's optimizers take a parameter into their groups."""
    return param.requires_grad and param.numel() > 0


def find_clusters(groups: Sequence[Mapping[str, Any]], table: ParameterTable) -> list[Cluster]:
    """Work out the groups that a native engine's optimizer has.

    Groups that DeepSpeed's limit has split are joined and split again, by DeepSpeed's own function,
    with native parameters. They are recognised by their equal settings, and by the function giving
    the groups at hand. A group that it would have split was made otherwise, and stays one.

    Args:
        groups: of the optimizer before DeepSpeed flattens them.
        table: of the model.

    Source: ``deepspeed/moe/utils.py``, split_params_into_different_moe_groups_for_optimizer.
    """
    clusters, begin = [], 0
    while begin < len(groups):
        end = begin + 1
        native = [table.expand(groups[begin]["params"])]
        if groups[begin].get("moe", False):
            alike = [
                stop
                for stop in range(begin + 1, len(groups) + 1)
                if have_same_settings(groups[begin:stop]) and _is_split(groups[begin:stop])
            ]
            if alike:
                end = alike[-1]
                params = [p for group in groups[begin:end] for p in group["params"]]
                native = split_experts([{"params": table.expand(params)}])
        stacked = [list(group["params"]) for group in groups[begin:end]]
        clusters.append(Cluster(stacked, native))
        begin = end
    return clusters


def have_same_settings(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether groups differ in their parameters alone."""
    settings = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    return all(other == settings[0] for other in settings[1:])


def split_experts(groups: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return the groups DeepSpeed makes of some experts' parameters."""
    params = [p for group in groups for p in group["params"]]
    made = split_params_into_different_moe_groups_for_optimizer({"params": params, "name": ""})
    return [group["params"] for group in made if group.get("moe") and group["params"]]


def _is_split(groups: Sequence[Mapping[str, Any]]) -> bool:
    found = [[id(p) for p in part] for part in split_experts(groups)]
    return found == [[id(p) for p in group["params"]] for group in groups]
