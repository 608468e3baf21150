# SPDX-License-Identifier: Apache-2.0
"""Conversion of optimizer states of single parameters between stacks and DeepSpeed's layout.

``layout.py`` explains the layouts. A file always has the native one. Conversion cuts and joins
tensors, and copies values that apply to a whole parameter, such as Adam's step; it computes
nothing. ``flat_states.py`` does this for optimizers that flatten their groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT
from deepspeed.ops.adam import FusedAdam
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import nn

from comet_ds.checkpoints.layout import Cluster, ParameterTable
from comet_ds.zero.optimizer_groups import PER_GROUP

MASTERS = "fp32 weights"  # their key among a parameter's states, while states are converted
NOT_ITS_STATES = "it has no states of this kind of optimizer"


def target_settings(
    cluster: Cluster, sources: Sequence[Mapping[str, Any]], table: ParameterTable, to_native: bool
) -> list[dict[str, Any]]:
    """Return the settings of a cluster's groups in the other layout.

    Args:
        cluster: the cluster.
        sources: its groups in an optimizer's state_dict.
        table: translates the model's parameters.
        to_native: True from the stacked layout to the native one, False back.

    Raises:
        RuntimeError: the cluster's groups have different settings.
    """
    settings = [settings_of(group) for group in sources]
    if any(other != settings[0] for other in settings[1:]):
        raise RuntimeError(
            f"the optimizer's groups of {cluster.native[0][0].name} and the parameters behind it "
            f"must have equal settings, because with one parameter per expert they are split at "
            f"other parameters, got {settings}"
        )
    names = [[native.name for native in group] for group in cluster.native]
    if not to_native:
        names = [[table.name(param) for param in group] for group in cluster.stacked]
    has_names = "param_names" in sources[0]
    return [{**settings[0], **({"param_names": n} if has_names else {})} for n in names]


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer group's settings without its parameters."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def copy_common(values: Sequence[Any], what: str) -> Any:
    """Return a copy of the value that all experts have.

    Args:
        values: one value of each expert.
        what: name of the value in the message.

    Raises:
        ValueError: the values differ.
    """
    for value in values[1:]:
        if value is not values[0] and not bool(value == values[0]):
            raise ValueError(f"{what} must be the same for all experts, got {values}")
    return _copy(values[0])


def _copy(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if torch.is_tensor(value) else value


def regroup_scheduler(
    state: Mapping[str, Any], counts: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    """Return a learning rate scheduler's state for another number of groups.

    Args:
        state: state_dict of the scheduler.
        counts: for each cluster, the number of groups in ``state`` and in the result.

    Raises:
        ValueError: the number of values in ``state`` is not the number of groups.
    """
    found = dict(state)
    for key, value in state.items():
        if key == "_schedulers":
            found[key] = [regroup_scheduler(s, counts) for s in value]
        elif key in PER_GROUP and isinstance(value, list | tuple):
            rest, values = list(value), []
            if len(rest) != sum(count for count, _ in counts):
                raise ValueError(
                    f"the learning rate scheduler's {key} must have a value for each of "
                    f"{sum(count for count, _ in counts)} groups, got {len(rest)}"
                )
            for count, wanted in counts:
                values += [rest[0]] * wanted
                rest = rest[count:]
            found[key] = type(value)(values)
    return found


class ParameterStates:
    """Converts the states of an optimizer with a state per parameter: torch's, unfused fp16.

    Args:
        optimizer: an engine's optimizer.
        clusters: its groups.
        table: of the model's parameters.
    """

    def __init__(self, optimizer: Any, clusters: Sequence[Cluster], table: ParameterTable) -> None:
        self._table = table
        self._is_wrapped = isinstance(optimizer, FP16_UnfusedOptimizer)
        self._is_fused_adam = type(optimizer) is FusedAdam
        self._clusters = clusters
        if self._is_wrapped:  # knows trained parameters only
            self._clusters = [cluster.trained() for cluster in clusters]

    def to_native(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state_dict as a native engine has it."""
        return self._convert(state, to_native=True)

    def from_native(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a native engine's state_dict as this one's optimizer has it.

        Raises:
            ValueError: what is one state here differs between the experts.
        """
        return self._convert(state, to_native=False)

    def difference(self, state: Any) -> str | None:
        """Say in what a file's layout differs from a native one of this model, None if not.

        Args:
            state: the optimizer's part of the file.
        """
        base = state
        if self._is_wrapped and isinstance(state, Mapping):
            base = state.get(OPTIMIZER_STATE_DICT)
        if not isinstance(base, Mapping) or "param_groups" not in base:
            return NOT_ITS_STATES
        if self._is_wrapped and "fp32_groups" not in state:
            return NOT_ITS_STATES
        natives = [group for cluster in self._clusters for group in cluster.native]
        sizes = [len(group["params"]) for group in base["param_groups"]]
        if sizes != [len(group) for group in natives]:
            expected = [len(group) for group in natives]
            return (
                f"its groups have {sizes} parameters, expected {expected}: ep_size, the model or "
                "the groups were different"
            )
        for group, entries in zip(natives, self._read(state, 0, natives), strict=True):
            for native, entry in zip(group, entries, strict=True):
                for key, value in entry.items():
                    if _is_per_element(key, value) and value.shape != native.shape:
                        return (
                            f"it has a state of shape {tuple(value.shape)} for {native.name}, "
                            f"expected {tuple(native.shape)}"
                        )
        return None

    def _convert(self, state: Mapping[str, Any], to_native: bool) -> dict[str, Any]:
        base = state[OPTIMIZER_STATE_DICT] if self._is_wrapped else state
        new_groups, new_state, new_masters, first, number = [], {}, [], 0, 0
        for cluster in self._clusters:
            sources, targets = _direction(cluster, to_native)
            groups = base["param_groups"][first : first + len(sources)]
            entries = self._read(state, first, sources)
            first += len(sources)
            by_name: dict[str, dict[str, Any]] = {}
            for params, found in zip(sources, entries, strict=True):
                for param, entry in zip(params, found, strict=True):
                    by_name |= self._split(param, entry) if to_native else {param.name: entry}
            settings = target_settings(cluster, groups, self._table, to_native)
            step = None
            if self._is_fused_adam and not cluster.is_same:
                step = take_step(by_name)
            for params, values in zip(targets, settings, strict=True):
                found = [by_name[p.name] if to_native else self._join(p, by_name) for p in params]
                if step is not None:
                    put_step(found, step, values.get("step", 0) if to_native else step)
                new_masters.append([entry.pop(MASTERS, None) for entry in found])
                numbers = list(range(number, number + len(params)))
                number += len(params)
                new_state |= {n: entry for n, entry in zip(numbers, found, strict=True) if entry}
                new_groups.append({**values, "params": numbers})
        new_base = {**base, "state": new_state, "param_groups": new_groups}
        if not self._is_wrapped:
            return new_base
        return {**state, OPTIMIZER_STATE_DICT: new_base, "fp32_groups": new_masters}

    def _read(
        self, state: Mapping[str, Any], first: int, groups: Sequence[Sequence[Any]]
    ) -> list[list[dict[str, Any]]]:
        """Return the states of the parameters of ``groups``, which begin with group ``first``."""
        base = state[OPTIMIZER_STATE_DICT] if self._is_wrapped else state
        found = []
        for index, params in enumerate(groups, start=first):
            numbers = base["param_groups"][index]["params"]
            entries = [dict(base["state"].get(number, {})) for number in numbers]
            if self._is_wrapped:
                for entry, master in zip(entries, state["fp32_groups"][index], strict=True):
                    entry[MASTERS] = master
            assert len(entries) == len(params)
            found.append(entries)
        return found

    def _split(self, param: nn.Parameter, entry: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Split a parameter's state into those of its native parameters, by name."""
        natives = self._table.natives(param)
        if natives[0].expert is None:
            return {natives[0].name: dict(entry)}
        for key, value in entry.items():
            if _is_per_element(key, value) and value.shape != param.shape:
                raise ValueError(
                    f"comet_ds cannot convert the optimizer's {key!r} of shape "
                    f'{tuple(value.shape)}: set "stack_experts" to false'
                )
        return {
            native.name: {
                key: _copy(native.part_of(value) if _is_per_element(key, value) else value)
                for key, value in entry.items()
            }
            for native in natives
        }

    def _join(self, param: nn.Parameter, by_name: Mapping[str, Any]) -> dict[str, Any]:
        """Join the states of a parameter's native parameters."""
        natives = self._table.natives(param)
        if natives[0].expert is None:
            return by_name[natives[0].name]
        entries = [by_name[native.name] for native in natives]
        keys = list(dict.fromkeys(key for entry in entries for key in entry))
        joined = {}
        for key in keys:
            if not all(key in entry for entry in entries):
                raise ValueError(f"some experts have no {key!r} of {natives[0].name} in the file")
            values = [entry[key] for entry in entries]
            if _is_per_element(key, values[0]):
                joined[key] = torch.stack([v.detach() for v in values]).view(param.shape)
            else:
                joined[key] = copy_common(values, f"{key!r} of {natives[0].name}")
        return joined


def _direction(cluster: Cluster, to_native: bool) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return a cluster's groups of parameters as they are and as they become."""
    if to_native:
        return cluster.stacked, cluster.native
    return cluster.native, cluster.stacked


def take_step(entries: Mapping[str, dict[str, Any]]) -> int | None:
    """Remove the step count of DeepSpeed's FusedAdam from a group's states and return it.

    FusedAdam keeps one count per group, in the state of the last parameter with a gradient.
    """
    return max((entry.pop("step") for entry in entries.values() if "step" in entry), default=None)


def put_step(entries: Sequence[dict[str, Any]], step: int, of_others: int) -> None:
    """Put FusedAdam's step count into a group's states.

    Args:
        entries: states of the group's parameters, changed in place.
        step: count for the last parameter that has a state.
        of_others: count for the others.
    """
    with_state = [entry for entry in entries if "exp_avg" in entry]
    for entry in with_state:
        others = {key: value for key, value in entry.items() if key != "step"}
        entry.clear()
        entry.update(step=step if entry is with_state[-1] else of_others, **others)


def _is_per_element(key: str, value: Any) -> bool:
    """Return whether a state has a value for each element of its parameter."""
    return torch.is_tensor(value) and key != "step"


def compare_shapes(
    saved: Sequence[Mapping[str, Any]],
    expected: Sequence[Mapping[str, Any]],
    table: ParameterTable,
) -> str | None:
    """Return how the parameters of a file differ from those of a native engine, None if not.

    Args:
        saved: ``param_shapes`` of the file: for each group, shapes by name in flat order.
        expected: ``param_shapes`` of a native engine.
        table: translates the model's parameters.
    """
    saved = [{name: tuple(shape) for name, shape in group.items()} for group in saved]
    expected = [{name: tuple(shape) for name, shape in group.items()} for group in expected]
    if [list(group.items()) for group in saved] == [list(group.items()) for group in expected]:
        return None
    have = {name: shape for group in saved for name, shape in group.items()}
    want = {name: shape for group in expected for name, shape in group.items()}
    if stacks := table.stack_names() & set(have):
        return f"it has stacks of experts, such as {min(stacks)}, which is not DeepSpeed's format"
    if have.keys() != want.keys():
        missing, surplus = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
        text = "; ".join(
            f"{len(names)} parameters are {how}, such as {names[0]}"
            for names, how in ((missing, "missing"), (surplus, "unknown here"))
            if names
        )
        counts = [_count_experts(names) for names in (have, want)]
        if counts[0] != counts[1]:
            text += (
                f"; a rank has {counts[0]} experts of a layer there and {counts[1]} here, so "
                "ep_size was different"
            )
        return text
    for name, shape in want.items():
        if have[name] != shape:
            return f"{name} has the shape {have[name]}, expected {shape}"
    if len(saved) != len(expected):
        return f"it has {len(saved)} groups of parameters, expected {len(expected)}"
    for index, (group, other) in enumerate(zip(saved, expected, strict=True)):
        for name, wanted in zip(group, other, strict=False):
            if name != wanted:
                return (
                    f"group {index} has {name} where {wanted} is expected: "
                    "round_robin_gradients or the order of the parameters was different"
                )
        if len(group) != len(other):
            return f"group {index} has {len(group)} parameters, expected {len(other)}"
    raise AssertionError("a difference was found above")


def _count_experts(names: Mapping[str, Any]) -> int:
    """Return the largest number of local experts of a layer."""
    marker = ".deepspeed_experts."
    found = [int(name.split(marker)[1].split(".")[0]) for name in names if marker in name]
    return max(found, default=-1) + 1
