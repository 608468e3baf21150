# SPDX-License-Identifier: Apache-2.0
"""Flattened groups of an optimizer, their partitions, and copies from one layout to another.

DeepSpeed concatenates a group's parameters, pads them, and gives each rank of the group's process
group an equal partition. Worked example: two ranks, parameters a, b and c of 4, 2 and 3 elements,
the end padded to a multiple of 4:

    rank 0   a a a a b b
    rank 1   c c c . . .

Rank 0's partition has two fragments: a from element 0, 4 elements at offset 0; and b from element
0, 2 elements at offset 4. Two layouts of the same elements are two sets of fragments, from which
the copies between the layouts follow.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from comet_ds._compat.deepspeed import accelerator
from comet_ds.checkpoints.layout import NativeParameter


class Fragment(NamedTuple):
    """Part of a native parameter in one rank's tensor; numbers are elements.

    Attributes:
        name: of the parameter.
        start: first element of the parameter.
        numel: number of elements.
        offset: place of the first element in the tensor.
    """

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True, eq=False)
class FlatGroup:
    """A group of an optimizer, flattened and cut into partitions.

    Attributes:
        params: native parameters of each parameter of the optimizer, in flat order.
        offsets: offset of each of ``params``, in elements.
        paddings: elements between each of ``params`` and the next.
        size: number of elements, including padding.
        num_partitions: number of equal partitions, one for each rank of the process group.
        linked: native parameters and the offsets that ``param_slice_mappings`` is made from.
    """

    params: list[list[NativeParameter]]
    offsets: list[int]
    paddings: list[int]
    size: int
    num_partitions: int
    linked: list[tuple[NativeParameter, int]]

    @property
    def partition_size(self) -> int:
        """Number of elements of a partition."""
        return self.size // self.num_partitions

    @property
    def end(self) -> int:
        """Offset of the padding at the end, in elements."""
        return self.offsets[-1] + _numel(self.params[-1]) if self.params else 0

    def padding_of(self, rank: int) -> int:
        """Return the number of padding elements at the end of a rank's partition."""
        return min(max((rank + 1) * self.partition_size - self.end, 0), self.partition_size)

    def fragments(self, rank: int) -> list[Fragment]:
        """Return the fragments in a rank's partition."""
        begin, found = rank * self.partition_size, []
        for param, offset in zip(self.params, self.offsets, strict=True):
            for native in param:
                start = max(begin - offset, 0)
                stop = min(begin + self.partition_size - offset, native.numel())
                if start < stop:
                    found.append(Fragment(native.name, start, stop - start, offset + start - begin))
                offset += native.numel()
        return found

    def whole_fragments(self, rank: int) -> list[Fragment]:
        """Return the fragments in a tensor of all whole parameters that a partition overlaps."""
        begin, at, found = rank * self.partition_size, 0, []
        for param, offset in zip(self.params, self.offsets, strict=True):
            if offset < begin + self.partition_size and offset + _numel(param) > begin:
                for native in param:
                    found.append(Fragment(native.name, 0, native.numel(), at))
                    at += native.numel()
        return found

    def slice_mapping(self, rank: int) -> OrderedDict[str, fragment_address]:
        """Return the entries of ``param_slice_mappings`` for a rank's partition."""
        begin, found = rank * self.partition_size, OrderedDict()
        for native, offset in self.linked:
            start = max(offset, begin)
            stop = min(offset + native.numel(), begin + self.partition_size)
            if start < stop:
                found[native.name] = fragment_address(start=start - begin, numel=stop - start)
        return found


def _numel(param: Sequence[NativeParameter]) -> int:
    return sum(native.numel() for native in param)


def flatten(
    params: Sequence[list[NativeParameter]],
    num_partitions: int,
    *,
    alignment: int = 1,
    end_alignment: int = 1,
    is_round_robin: bool = False,
) -> FlatGroup:
    """Lay out a group as DeepSpeed does.

    Args:
        params: native parameters of each parameter of the optimizer.
        num_partitions: number of ranks of the group's process group.
        alignment: alignment of each of ``params``, in elements.
        end_alignment: alignment of the whole group's size, in elements.
        is_round_robin: whether ``params`` are first dealt out to the partitions in turn.

    Source: ``deepspeed/runtime/zero/stage_1_and_2.py``, the loop of DeepSpeedZeroOptimizer's
    constructor, _round_robin_reorder, _link_all_hp_params.
    """
    order = list(range(len(params)))
    if is_round_robin:
        order = [i for rank in range(num_partitions) for i in order[rank::num_partitions]]
    offsets, paddings, at = [], [], 0
    for place, index in enumerate(order):
        offsets.append(at)
        at += _numel(params[index])
        paddings.append(0 if place == len(order) - 1 else -at % alignment)
        at += paddings[-1]
    # Without paddings DeepSpeed links parameters in the order before they were dealt out.
    if any(paddings):
        starts = {index: offset for index, offset in zip(order, offsets, strict=True)}
        starts = [starts[index] for index in range(len(params))]
    else:
        starts = [0, *itertools.accumulate(_numel(param) for param in params)]
    return FlatGroup(
        params=[params[index] for index in order],
        offsets=offsets,
        paddings=paddings,
        size=math.ceil(at / end_alignment) * end_alignment,
        num_partitions=num_partitions,
        linked=[(param[0], start) for param, start in zip(params, starts, strict=False)],
    )


class Move(NamedTuple):
    """A copy of elements from one rank's tensor to another's.

    Attributes:
        source_rank, target_rank: ranks of the process group.
        source, target: index of the tensor on its rank.
        source_offset, target_offset: first element in the tensor.
        numel: number of elements.
    """

    source_rank: int
    source: int
    source_offset: int
    target_rank: int
    target: int
    target_offset: int
    numel: int


FragmentTable = Sequence[Sequence[Sequence[Fragment]]]  # by rank, then by tensor


def plan_moves(sources: FragmentTable, targets: FragmentTable) -> list[Move]:
    """Return the copies that fill all ranks' target tensors from all ranks' source tensors.

    If several ranks hold an element, it is copied from the target's own rank, or the first of them.
    """
    held: dict[str, list[tuple[int, int, Fragment]]] = {}
    for rank, tensors in enumerate(sources):
        for index, fragments in enumerate(tensors):
            for fragment in fragments:
                held.setdefault(fragment.name, []).append((rank, index, fragment))
    moves = []
    for rank, tensors in enumerate(targets):
        for index, fragments in enumerate(tensors):
            for fragment in fragments:
                start, stop = fragment.start, fragment.start + fragment.numel
                for source_rank, source, other in sorted(
                    held[fragment.name], key=lambda h: (h[2].start, h[0] != rank, h[0])
                ):
                    end = min(other.start + other.numel, stop)
                    if other.start <= start < end:
                        offset = other.offset + start - other.start
                        to = fragment.offset + start - fragment.start
                        moves.append(
                            Move(source_rank, source, offset, rank, index, to, end - start)
                        )
                        start = end
                assert start == stop, f"{fragment} is on no rank"
    return moves


def run_moves(
    moves: Sequence[Move],
    sources: Sequence[Tensor | None],
    sizes: Sequence[int],
    dtype: torch.dtype,
    process_group: Any,
) -> list[Tensor]:
    """Run copies. Collective over the process group if elements go from rank to rank.

    Args:
        moves: the same on all ranks.
        sources: this rank's flat tensors; None for one that it does not have.
        sizes: number of elements of this rank's target tensors.
        dtype: dtype of the targets.
        process_group: None for a single rank.

    Returns:
        The targets, on the CPU; elements that were not copied are 0.
    """
    rank = 0 if process_group is None else dist.get_rank(group=process_group)
    sources = [None if t is None else t.detach().reshape(-1).cpu() for t in sources]
    targets = [torch.zeros(size, dtype=dtype) for size in sizes]

    def read(move: Move) -> Tensor:
        source = sources[move.source]
        assert source is not None, "a rank sends what it has"
        return source.narrow(0, move.source_offset, move.numel).to(dtype)

    def write(move: Move, values: Tensor) -> None:
        targets[move.target].narrow(0, move.target_offset, move.numel).copy_(values)

    away = [move for move in moves if move.source_rank != move.target_rank]
    for move in moves:
        if move.source_rank == move.target_rank == rank:
            write(move, read(move))
    if not away:
        return targets
    ranks = range(dist.get_world_size(group=process_group))
    outgoing = [[m for m in away if (m.source_rank, m.target_rank) == (rank, r)] for r in ranks]
    incoming = [[m for m in away if (m.source_rank, m.target_rank) == (r, rank)] for r in ranks]
    device = accelerator().current_device_name()
    parts = [read(move) for moves_to in outgoing for move in moves_to]
    sent = torch.cat([torch.empty(0, dtype=dtype), *parts]).to(device)
    received = torch.empty(sum(m.numel for ms in incoming for m in ms), dtype=dtype, device=device)
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[sum(m.numel for m in ms) for ms in incoming],
        input_split_sizes=[sum(m.numel for m in ms) for ms in outgoing],
        group=process_group,
    )
    arrived = [move for moves_from in incoming for move in moves_from]
    for move, values in zip(
        arrived, received.cpu().split([move.numel for move in arrived]), strict=True
    ):
        write(move, values)
    return targets
