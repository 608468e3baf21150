# SPDX-License-Identifier: Apache-2.0
"""The stacked and the native layout of a model's parameters in an optimizer.

A model has two layouts with the same elements:

    stacked   in this engine: one parameter for each matrix of all local experts of a layer
    native    in an engine with DeepSpeed's own layers: one parameter per expert and matrix

A stack is a sequence of El native parameters; El is the number of local experts. An optimizer that
flattens its groups (ZeRO, BF16_Optimizer, FP16_Optimizer) orders them differently in each layout.
With two experts of two matrices a and b:

    stacked   | a of expert 0 | a of expert 1 | b of expert 0 | b of expert 1 |
    native    | a of expert 0 | b of expert 0 | a of expert 1 | b of expert 1 |

The groups of experts end at different parameters as well, because DeepSpeed begins a new group
where the next parameter would exceed a limit.

``flat_groups.py`` has the layout within a flattened group, ``states.py`` and ``flat_states.py``
convert the states that optimizers save.
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
        name: name in ``state_dict()``.
        shape: shape of the parameter.
        holder: the model's parameter itself, or the stack that contains it; of a
            file, an object with the parameter's tags.
        expert: index in the stack, the local expert; None if ``holder`` is the parameter itself.
    """

    name: str
    shape: torch.Size
    holder: Any
    expert: int | None

    @property
    def allreduce(self) -> bool:
        """DeepSpeed's tag by which it splits an optimizer's groups."""
        return getattr(self.holder, "allreduce", True)

    @property
    def group_name(self) -> str:
        """DeepSpeed's tag of an expert's parameter."""
        return self.holder.group_name

    def numel(self) -> int:
        """Return the number of elements."""
        return self.shape.numel()

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the parameter's part of a tensor that has its holder's shape."""
        return tensor if self.expert is None else tensor.reshape(-1, *self.shape)[self.expert]


class ParameterTable:
    """Translates a model's parameters into native parameters.

    Args:
        module: the model.
        names: names of its parameters in ``named_parameters()``.
    """

    def __init__(self, module: nn.Module, names: Mapping[nn.Parameter, str]) -> None:
        self._names = names
        self._view_names: dict[tuple[int, str, int], str] = {}
        self._owners: dict[int, StackedExperts] = {}  # by id of a stack or unstacked parameter
        self._keys: dict[int, str] = {}  # key of a stack, by its id
        # By id of the StackedExperts, then by (key of the stack, expert) or by id of an unstacked
        # parameter: the expert, and the position in the order of parameters().
        self._places: dict[int, dict[Any, tuple[int, int]]] = {}
        for path, child in module.named_modules():
            if isinstance(own := child._parameters, ViewDict):
                for name, key in own.stack_keys.items():
                    view = id(own.experts), key, own.index
                    self._view_names.setdefault(view, f"{path}.{name}" if path else name)
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
            RuntimeError: the experts were unstacked after the table was made.
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

    def natives(self, param: nn.Parameter) -> list[NativeParameter]:
        """Return the native parameters in one of the model's parameters, by expert."""
        if not self.is_stack(param):
            return [NativeParameter(self._names[param], param.shape, param, None)]
        experts, key = self._owners[id(param)], self._keys[id(param)]
        shape = torch.Size(experts.shapes[key])
        names = [self._view_names[id(experts), key, i] for i in range(experts.num_local_experts)]
        return [NativeParameter(name, shape, param, i) for i, name in enumerate(names)]

    def expand(self, params: Iterable[nn.Parameter]) -> list[NativeParameter]:
        """Return the native layout's parameters for a list of the model's parameters.

        Neighbours of one layer are ordered by expert, as in ``model.parameters()``. Within an
        expert the order is that of its parameters, or, if the stacks in the list have another
        order, that of the list.
        """
        found: list[NativeParameter] = []
        for owner, run in itertools.groupby(params, lambda p: id(self._owners.get(id(p)))):
            run = list(run)
            natives = [native for param in run for native in self.natives(param)]
            if any(self.is_stack(param) for param in run):
                natives = self._by_expert(natives, self._places[owner])
            found += natives
        return found

    def _by_expert(
        self, natives: list[NativeParameter], places: Mapping[Any, tuple[int, int]]
    ) -> list[NativeParameter]:
        def place(native: NativeParameter) -> tuple[int, int]:
            if native.expert is None:
                return places[id(native.holder)]
            return places[self._keys[id(native.holder)], native.expert]

        first_places = [place(native) for native in natives if native.expert == 0]
        if first_places == sorted(first_places):
            return sorted(natives, key=place)
        return sorted(natives, key=lambda native: place(native)[0])


@dataclass(frozen=True, eq=False)
class Cluster:
    """Neighbouring groups of an optimizer that hold the same elements in both layouts.

    Attributes:
        stacked: the model's parameters in each group of this engine's optimizer.
        native: the native parameters in each group of a native engine's optimizer.
    """

    stacked: list[list[nn.Parameter]]
    native: list[list[NativeParameter]]

    @property
    def is_same(self) -> bool:
        """Whether both layouts are the same because there are no stacks."""
        return all(native.expert is None for group in self.native for native in group)

    def trained(self) -> Cluster:
        """Return the cluster without frozen parameters."""
        stacked = [[p for p in group if is_trained(p)] for group in self.stacked]
        native = [[n for n in group if is_trained(n.holder)] for group in self.native]
        return Cluster([g for g in stacked if g], [g for g in native if g])


def is_trained(param: nn.Parameter) -> bool:
    """Return whether DeepSpeed's optimizers take a parameter into their groups."""
    return param.requires_grad and param.numel() > 0


def find_clusters(groups: Sequence[Mapping[str, Any]], table: ParameterTable) -> list[Cluster]:
    """Determine the groups of a native engine's optimizer.

    Groups that DeepSpeed has split at its size limit are joined, and split again with native
    parameters by DeepSpeed's own function. Groups are joined if their settings are equal and the
    function splits their parameters into the same groups. A single group that the function would
    split was made in another way and stays one group.

    Args:
        groups: groups of the optimizer before DeepSpeed flattens them.
        table: translates the model's parameters.

    Source: ``deepspeed/moe/utils.py``, split_params_into_different_moe_groups_for_optimizer.
    """
    clusters, begin = [], 0
    while begin < len(groups):
        end = begin + 1
        native = [table.expand(groups[begin]["params"])]
        if groups[begin].get("moe", False):
            same = [
                stop
                for stop in range(begin + 1, len(groups) + 1)
                if have_same_settings(groups[begin:stop]) and _is_split(groups[begin:stop])
            ]
            if same:
                end = same[-1]
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
    """Return the groups into which DeepSpeed splits some experts' parameters."""
    params = [p for group in groups for p in group["params"]]
    made = split_params_into_different_moe_groups_for_optimizer({"params": params, "name": ""})
    return [group["params"] for group in made if group.get("moe") and group["params"]]


def _is_split(groups: Sequence[Mapping[str, Any]]) -> bool:
    found = [[id(p) for p in part] for part in split_experts(groups)]
    return found == [[id(p) for p in group["params"]] for group in groups]
