# SPDX-License-Identifier: Apache-2.0
"""Optimizer states of flattened groups: what a file has, DeepSpeed's layout, from stacks and back.

Of ZeRO 1 and 2, BF16_Optimizer and FP16_Optimizer. Where a group is cut into partitions, the ranks
of its process group exchange what lies on another rank in the other layout: saving and loading are
collective, as they are for DeepSpeed.
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

# Not in files of DeepSpeed 0.19.6, which knows no paddings between parameters.
PARAM_ALIGNMENT_PADDINGS = "param_alignment_paddings"

Facts = Mapping[str, Sequence[tuple[int, torch.dtype] | None]]  # by kind, of each group


def partition_facts(groups: Sequence[tuple[FlatGroup, int]], is_zero: bool) -> dict[str, Any]:
    """Return what a file says about the partitions that it holds.

    Args:
        groups: of the optimizer, each with the number of the file's rank in its process group.
        is_zero: of ZeRO 1 or 2, else of BF16_Optimizer.
    """
    paddings = [flat.padding_of(rank) for flat, rank in groups]
    if not is_zero:  # BF16_Optimizer counts the last partition's only
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
    """A cluster of an optimizer that flattens its groups.

    Attributes:
        process_group: its ranks have a partition each; None for a single rank.
        stacked, native: the cluster's groups in the two layouts.
        unaligned: the native groups of a DeepSpeed that does not align parameters.
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
        """Return what all ranks say."""
        if self.num_ranks == 1:
            return [facts]
        all_facts: list[Any] = [None] * self.num_ranks
        # Not DeepSpeed's: its communication logger knows no objects, and ends the process.
        torch.distributed.all_gather_object(all_facts, facts, group=self.process_group)
        return all_facts


class FlatStates:
    """Of an optimizer that flattens its groups.

    Args:
        optimizer: an engine's.
        clusters: its groups.
        table: of the model's parameters.

    Raises:
        RuntimeError: this DeepSpeed lays groups out in another way than this module knows.
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
        """Return the layouts of a cluster whose first group is the optimizer's given one."""
        optimizer, process_group, options = self._optimizer, None, {}
        num_ranks, alignment = 1, 1
        if self._is_partitioned:
            process_group = optimizer.real_dp_process_group[first]
            num_ranks = dist.get_world_size(group=process_group)
            options["end_alignment"] = optimizer.nccl_start_alignment_factor * num_ranks
        if self._is_zero:
            options["is_round_robin"] = optimizer.round_robin_gradients
            if getattr(optimizer, "parameter_alignment", False):  # 16 bytes
                alignment = max(16 // optimizer.bit16_groups_flat[first].element_size(), 1)
        stacked = [[self._table.rows(param) for param in group] for group in cluster.stacked]
        native = [[[param] for param in group] for group in cluster.native]
        layouts = [
            [flatten(units, num_ranks, alignment=size, **options) for units in groups]
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
            [[id(unit[0].holder) for unit in flat.units] for flat in flats],
            [flat.partition_size for flat in flats],
            [flat.offsets for flat in flats],
        )
        if found != expected:
            raise RuntimeError(
                f"DeepSpeed {version} lays out an optimizer's groups in a way that comet_ds does "
                'not know: set "stack_experts" to false to save and load checkpoints'
            )

    def _native(self, is_aligned: bool = True) -> list[tuple[FlatGroup, int]]:
        """Return all native groups, each with this rank's number in its process group."""
        return [
            (flat, part.rank)
            for part in self._parts
            for flat in (part.native if is_aligned else part.unaligned)
        ]

    def param_shapes(self) -> list[OrderedDict[str, torch.Size]]:
        """Return what a native engine saves as ``param_shapes``."""
        return [
            OrderedDict((unit[0].name, unit[0].shape) for unit in flat.units)
            for flat, _ in self._native()
        ]

    def to_native(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state_dict as a native engine has it; collective."""
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
        """Return a native engine's state_dict as this one's optimizer has it; collective."""
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
        """Say in what a file's layout differs from a native one of this model, None if not.

        Args:
            state: the optimizer's part of this rank's file.
            shapes: ``param_shapes`` of the model's file; FP16_Optimizer's has none.
        """
        if not isinstance(state, Mapping) or self._masters_key not in state:
            return NOT_ITS_STATES
        if not isinstance(state.get(self._base_key), Mapping):
            return '"elastic_checkpoint" was set, which goes with one parameter per expert only'
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
            return "parameter_alignment was set otherwise"
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
        """Return a cluster's fp32 weights and states, of each group, in the other layout."""
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
        """Convert one kind of tensors.

        Args:
            given: this rank's, one of each source group.
            facts: elements and dtype of all ranks'.

        Raises:
            ValueError: on all ranks, where a tensor has not the size of its group.
        """
        is_whole = self._is_whole(part, kind)
        pieces = [
            [
                [f.whole_pieces(rank) if is_whole else f.pieces(rank) for f in flats]
                for rank in range(part.num_ranks)
            ]
            for flats in (sources, targets)
        ]
        for found, expected in zip(facts, pieces[0], strict=True):
            for flat, fact, of_group in zip(sources, found, expected, strict=True):
                least = max((p.offset + p.numel for p in of_group), default=0)
                most = least if is_whole else flat.partition_size
                numel = 0 if fact is None else fact[0]
                if not least <= numel <= most:
                    raise ValueError(
                        f"the optimizer's {kind} of {flat.units[0][0].name} and the parameters "
                        f"behind it has {numel} elements, expected {most}: comet_ds cannot convert "
                        'it; set "stack_experts" to false'
                    )
        dtype = next(fact[1] for found in facts for fact in found if fact is not None)
        sizes = [
            sum(p.numel for p in of_group) if is_whole else flat.partition_size
            for flat, of_group in zip(targets, pieces[1][part.rank], strict=True)
        ]
        return run_moves(plan_moves(*pieces), given, sizes, dtype, part.process_group)

    def _is_whole(self, part: _Part, kind: str) -> bool:
        """Return whether a state has whole parameters, all that a partition has a part of.

        Source: ``deepspeed/runtime/zero/stage_1_and_2.py``, get_flat_partition: momentum of
        DeepSpeed's Muon where the optimizer is not offloaded.
        """
        if kind != "momentum_buffer" or not self._is_zero or self._optimizer.cpu_offload:
            return False
        is_muon = "muon" in type(self._optimizer.optimizer).__name__.lower()
        return is_muon and getattr(part.stacked[0].units[0][0].holder, "use_muon", False)
