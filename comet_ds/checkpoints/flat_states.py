# SPDX-License-Identifier: Apache-2.0
"""Conversion of optimizer states of flattened groups between stacks and DeepSpeed's layout.

For ZeRO 1 and 2, BF16_Optimizer and FP16_Optimizer. If groups are cut into partitions, an element
may be on another rank in the other layout, and the ranks of the process group exchange it. So
saving and loading are collective, as they are for DeepSpeed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    GROUP_PADDINGS,
    OPTIMIZER_STATE_DICT,
    PARAM_SLICE_MAPPINGS,
    PARTITION_COUNT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.git_version_info import version
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from comet_ds.checkpoints.flat_groups import FlatGroup, flatten, plan_moves, run_moves
from comet_ds.checkpoints.layout import Cluster, ParameterTable
from comet_ds.checkpoints.states import (
    MASTERS,
    NOT_ITS_STATES,
    compare_shapes,
    copy_common,
    target_settings,
)

# Not in files of DeepSpeed 0.19.6, which has no padding between parameters.
PARAM_ALIGNMENT_PADDINGS = "param_alignment_paddings"

# By kind of tensor (fp32 weights or a state's key): elements and dtype in each group.
Facts = Mapping[str, Sequence[tuple[int, torch.dtype] | None]]


def partition_facts(groups: Sequence[tuple[FlatGroup, int]], is_zero: bool) -> dict[str, Any]:
    """Return the entries of a file that describe its partitions.

    Args:
        groups: the optimizer's groups, each with the rank in its process group.
        is_zero: True for ZeRO 1 and 2, False for BF16_Optimizer.
    """
    paddings = [flat.padding_of(rank) for flat, rank in groups]
    if not is_zero:  # BF16_Optimizer records the padding of the last partition only
        paddings = [
            flat.size - flat.end if rank == flat.num_partitions - 1 else 0 for flat, rank in groups
        ]
    return {
        GROUP_PADDINGS: paddings,
        PARTITION_COUNT: [flat.num_partitions for flat, _ in groups],
        PARAM_SLICE_MAPPINGS: [flat.slice_mapping(rank) for flat, rank in groups],
        PARAM_ALIGNMENT_PADDINGS: [flat.paddings for flat, _ in groups],
    }


@dataclass(frozen=True, eq=False)
class _Part:
    """A cluster of groups of an optimizer that flattens its groups.

    Attributes:
        cluster: the cluster.
        process_group: its ranks have a partition each; None for a single rank.
        stacked, native: the cluster's groups in the two layouts.
        unaligned: the native groups as DeepSpeed lays them out without alignment of parameters.
    """

    cluster: Cluster
    process_group: Any
    stacked: list[FlatGroup]
    native: list[FlatGroup]
    unaligned: list[FlatGroup]

    @property
    def rank(self) -> int:
        return 0 if self.process_group is None else dist.get_rank(group=self.process_group)

    @property
    def num_ranks(self) -> int:
        return self.native[0].num_partitions

    def gather(self, facts: Facts) -> list[Facts]:
        """Return the facts of all ranks of the process group. Collective."""
        if self.num_ranks == 1:
            return [facts]
        all_facts: list[Any] = [None] * self.num_ranks
        # torch's function: DeepSpeed's communication logger fails on objects.
        torch.distributed.all_gather_object(all_facts, facts, group=self.process_group)
        return all_facts


class FlatStates:
    """Converts the states of an optimizer that flattens its groups.

    Args:
        optimizer: an engine's optimizer.
        clusters: the clusters of its groups.
        table: translates the model's parameters.

    Raises:
        RuntimeError: this version of DeepSpeed lays groups out in a way unknown to this module.
    """

    def __init__(self, optimizer: Any, clusters: Sequence[Cluster], table: ParameterTable) -> None:
        self._optimizer, self._table = optimizer, table
        self._is_zero = isinstance(optimizer, DeepSpeedZeroOptimizer)
        self._is_partitioned = not isinstance(optimizer, FP16_Optimizer)
        self._base_key, self._masters_key = BASE_OPTIMIZER_STATE, SINGLE_PARTITION_OF_FP32_GROUPS
        if not self._is_partitioned:
            self._base_key, self._masters_key = OPTIMIZER_STATE_DICT, "fp32_groups_flat"
        self._parts: list[_Part] = []
        for cluster in clusters:
            if (cluster := cluster.trained()).stacked:
                first = sum(len(part.stacked) for part in self._parts)
                self._parts.append(self._lay_out(cluster, first))
        self._check_own_layout()

    def _lay_out(self, cluster: Cluster, first: int) -> _Part:
        """Return a cluster's layouts; ``first`` is the index of its first group."""
        optimizer, process_group, options = self._optimizer, None, {}
        num_ranks, alignment = 1, 1
        if self._is_partitioned:
            process_group = optimizer.real_dp_process_group[first]
            num_ranks = dist.get_world_size(group=process_group)
            options["end_alignment"] = optimizer.nccl_start_alignment_factor * num_ranks
        if self._is_zero:
            options["is_round_robin"] = optimizer.round_robin_gradients
            if getattr(optimizer, "parameter_alignment", False):  # DeepSpeed aligns to 16 bytes
                alignment = max(16 // optimizer.bit16_groups_flat[first].element_size(), 1)
        stacked = [[self._table.natives(param) for param in group] for group in cluster.stacked]
        native = [[[param] for param in group] for group in cluster.native]
        layouts = [
            [flatten(params, num_ranks, alignment=size, **options) for params in groups]
            for groups, size in ((stacked, alignment), (native, alignment), (native, 1))
        ]
        return _Part(cluster, process_group, *layouts)

    def _check_own_layout(self) -> None:
        optimizer, flats = self._optimizer, [f for part in self._parts for f in part.stacked]
        offsets = [flat.offsets for flat in flats]
        if self._is_zero:
            groups, tensors = (
                optimizer.round_robin_bit16_groups,
                optimizer.single_partition_of_fp32_groups,
            )
            offsets = getattr(optimizer, "round_robin_bit16_offsets", offsets)
        elif self._is_partitioned:
            groups, tensors = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        else:
            groups, tensors = optimizer.fp16_groups, optimizer.fp32_groups_flat
        found = [[id(p) for p in group] for group in groups], [t.numel() for t in tensors], offsets
        expected = (
            [[id(param[0].holder) for param in flat.params] for flat in flats],
            [flat.partition_size for flat in flats],
            [flat.offsets for flat in flats],
        )
        if found != expected:
            raise RuntimeError(
                f"DeepSpeed {version} lays out an optimizer's groups in a way that comet_ds does "
                'not know: set "stack_experts" to false to save and load checkpoints'
            )

    def _native(self, is_aligned: bool = True) -> list[tuple[FlatGroup, int]]:
        """Return all native groups, each with this rank's rank in its process group."""
        return [
            (flat, part.rank)
            for part in self._parts
            for flat in (part.native if is_aligned else part.unaligned)
        ]

    def param_shapes(self) -> list[OrderedDict[str, torch.Size]]:
        """Return the ``param_shapes`` that a native engine saves."""
        return [
            OrderedDict((param[0].name, param[0].shape) for param in flat.params)
            for flat, _ in self._native()
        ]

    def to_native(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the optimizer's state_dict to the native layout. Collective."""
        state = self._convert(state, to_native=True, is_aligned=True)
        if not self._is_partitioned:
            return state
        natives = self._native()
        if self._is_zero:
            paddings = [flat.padding_of(rank) for flat, rank in natives]
            masters = zip(state[self._masters_key], natives, paddings, strict=True)
            state[self._masters_key] = [m[: f.partition_size - p] for m, (f, _), p in masters]
        facts = partition_facts(natives, self._is_zero)
        if PARAM_ALIGNMENT_PADDINGS not in state:
            del facts[PARAM_ALIGNMENT_PADDINGS]
        state.update(facts)
        return state

    def from_native(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a native engine's state_dict to this optimizer's layout. Collective."""
        is_aligned = not self._is_zero or PARAM_ALIGNMENT_PADDINGS in state
        state = self._convert(state, to_native=False, is_aligned=is_aligned)
        if self._is_zero:
            state[GROUP_PADDINGS] = self._optimizer.groups_padding
            if hasattr(self._optimizer, "round_robin_bit16_padding"):
                state[PARAM_ALIGNMENT_PADDINGS] = self._optimizer.round_robin_bit16_padding
        return state

    def difference(
        self, state: Any, shapes: Sequence[Mapping[str, Any]] | None = None
    ) -> str | None:
        """Return how a file's layout differs from the native layout of this model, None if not.

        Args:
            state: the optimizer's state_dict in this rank's file.
            shapes: ``param_shapes`` of the model's file; with FP16_Optimizer there are none.
        """
        if not isinstance(state, Mapping) or self._masters_key not in state:
            return NOT_ITS_STATES
        if not isinstance(state.get(self._base_key), Mapping):
            return '"elastic_checkpoint" was set, which requires one parameter per expert'
        if self._is_partitioned and (
            problem := compare_shapes(shapes or [], self.param_shapes(), self._table)
        ):
            return problem
        paddings = state.get(PARAM_ALIGNMENT_PADDINGS)
        natives = self._native(not self._is_zero or paddings is not None)
        sizes = [master.numel() for master in state[self._masters_key]]
        if len(sizes) != len(natives):
            return f"it has {len(sizes)} groups of parameters, expected {len(natives)}"
        if self._is_zero and paddings not in (None, [flat.paddings for flat, _ in natives]):
            return "parameter_alignment was different"
        expected = [flat.num_partitions for flat, _ in natives]
        counts = list(state.get(PARTITION_COUNT, expected))
        if counts != expected:
            return f"its groups are spread over {counts} ranks, expected {expected}"
        for index, ((flat, rank), size) in enumerate(zip(natives, sizes, strict=True)):
            if not 0 <= flat.partition_size - size <= flat.padding_of(rank):
                return f"group {index} has {size} elements, expected {flat.partition_size}"
        return None

    def _convert(
        self, state: Mapping[str, Any], *, to_native: bool, is_aligned: bool
    ) -> dict[str, Any]:
        base, all_masters = state[self._base_key], state[self._masters_key]
        new_state, new_groups, new_masters, first = {}, [], [], 0
        for part in self._parts:
            native = part.native if is_aligned else part.unaligned
            sources, targets = (part.stacked, native) if to_native else (native, part.stacked)
            groups = base["param_groups"][first : first + len(sources)]
            masters = list(all_masters[first : first + len(sources)])
            first += len(sources)
            entries = [base["state"].get(group["params"][0], {}) for group in groups]
            if not part.cluster.is_same or not is_aligned:
                masters, entries = self._move(part, masters, entries, sources, targets)
            settings = target_settings(part.cluster, groups, self._table, to_native)
            for entry, values in zip(entries, settings, strict=True):
                if entry:
                    new_state[len(new_groups)] = entry
                new_groups.append({**values, "params": [len(new_groups)]})
            new_masters += masters
        base = {**base, "state": new_state, "param_groups": new_groups}
        return {**state, self._base_key: base, self._masters_key: new_masters}

    def _move(
        self,
        part: _Part,
        masters: Sequence[Tensor],
        entries: Sequence[Mapping[str, Any]],
        sources: list[FlatGroup],
        targets: list[FlatGroup],
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Return a cluster's fp32 weights and states in the other layout, by group. Collective."""
        tensors: dict[str, list[Tensor | None]] = {MASTERS: list(masters)}
        others: dict[str, list[Any]] = {}
        for index, entry in enumerate(entries):
            for key, value in entry.items():
                if torch.is_tensor(value) and value.dim() > 0:
                    tensors.setdefault(key, [None] * len(entries))[index] = value
                else:
                    others.setdefault(key, []).append(value)
        new_entries: list[dict[str, Any]] = [{} for _ in targets]
        for key, values in others.items():
            for entry in new_entries:
                entry[key] = copy_common(values, f"the optimizer's {key!r}")
        facts = {
            kind: [None if t is None else (t.numel(), t.dtype) for t in found]
            for kind, found in tensors.items()
        }
        all_facts = part.gather(facts)
        none = [None] * len(sources)
        for kind in dict.fromkeys(kind for facts in all_facts for kind in facts):
            moved = self._move_kind(
                part,
                kind,
                tensors.get(kind, none),
                [facts.get(kind, none) for facts in all_facts],
                sources,
                targets,
            )
            for entry, tensor in zip(new_entries, moved, strict=True):
                if tensor.numel():
                    entry[kind] = tensor
        return [entry.pop(MASTERS) for entry in new_entries], new_entries

    def _move_kind(
        self,
        part: _Part,
        kind: str,
        given: Sequence[Tensor | None],
        facts: Sequence[Sequence[tuple[int, torch.dtype] | None]],
        sources: list[FlatGroup],
        targets: list[FlatGroup],
    ) -> list[Tensor]:
        """Convert one kind of tensors. Collective.

        Args:
            part: the cluster.
            kind: key of the tensors.
            given: this rank's tensors, one of each source group.
            facts: elements and dtype of the tensors of all ranks.
            sources, targets: the cluster's groups in the two layouts.

        Raises:
            ValueError: on all ranks, if a tensor does not have the size of its group.
        """
        is_whole = self._is_whole(part, kind)
        fragments = [
            [
                [f.whole_fragments(rank) if is_whole else f.fragments(rank) for f in flats]
                for rank in range(part.num_ranks)
            ]
            for flats in (sources, targets)
        ]
        for found, expected in zip(facts, fragments[0], strict=True):
            for flat, fact, of_group in zip(sources, found, expected, strict=True):
                least = max((p.offset + p.numel for p in of_group), default=0)
                most = least if is_whole else flat.partition_size
                numel = 0 if fact is None else fact[0]
                if not least <= numel <= most:
                    raise ValueError(
                        f"the optimizer's {kind} of {flat.params[0][0].name} and the parameters "
                        f"behind it has {numel} elements, expected {most}: comet_ds cannot convert "
                        'it; set "stack_experts" to false'
                    )
        dtype = next(fact[1] for found in facts for fact in found if fact is not None)
        sizes = [
            sum(p.numel for p in of_group) if is_whole else flat.partition_size
            for flat, of_group in zip(targets, fragments[1][part.rank], strict=True)
        ]
        return run_moves(plan_moves(*fragments), given, sizes, dtype, part.process_group)

    def _is_whole(self, part: _Part, kind: str) -> bool:
        """Return whether a state holds whole parameters, those that a partition overlaps.

        Source: ``deepspeed/runtime/zero/stage_1_and_2.py``, get_flat_partition: momentum of
        DeepSpeed's Muon where the optimizer is not offloaded.
        """
        if kind != "momentum_buffer" or not self._is_zero or self._optimizer.cpu_offload:
            return False
        is_muon = "muon" in type(self._optimizer.optimizer).__name__.lower()
        return is_muon and getattr(part.stacked[0].params[0][0].holder, "use_muon", False)
