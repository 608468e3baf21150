# SPDX-License-Identifier: Apache-2.0
"""Flattened groups of an optimizer, their partitions, and copies from one layout to another.

DeepSpeed concatenates a group's parameters, pads them, and gives each rank of the group's process
group an equal part. Two ranks, parameters a, b and c of 4, 2 and 3 elements, the end padded to a
multiple of 4:

    rank 0   a a a a b b
    rank 1   c c c . . .

Rank 0's pieces are a from element 0 on, 4 elements at offset 0, and b, 2 elements at offset 4. Two
layouts of the same elements are two sets of pieces, and the copies between them follow from that.
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
from deepspeed.accelerator import get_accelerator
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from comet_ds.checkpoints.layout import NativeParameter


class Piece(NamedTuple):
    """Part of a native parameter in one rank's tensor, in elements."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True, eq=False)
class FlatGroup:
    """A group of an optimizer, flattened and cut into partitions.

    Attributes:
        units: the native parameters of each parameter of the optimizer, in flat order.
        offsets: of the units.
        paddings: elements between a unit and the next.
        size: elements with padding.
        num_partitions: equal parts, one for each rank of the process group.
        linked: native parameters with the offsets DeepSpeed's ``param_slice_mappings`` go by.
    """

    units: list[list[NativeParameter]]
    offsets: list[int]
    paddings: list[int]
    size: int
    num_partitions: int
    linked: list[tuple[NativeParameter, int]]

    @property
    def partition_size(self) -> int:
        """Return the number of elements of a partition."""
        return self.size // self.num_partitions

    @property
    def end(self) -> int:
        """Return the offset behind the last unit; padding follows."""
        return self.offsets[-1] + _numel(self.units[-1]) if self.units else 0

    def padding_of(self, rank: int) -> int:
        """Return how many elements at the end of a partition belong to no parameter."""
        return min(max((rank + 1) * self.partition_size - self.end, 0), self.partition_size)

    def pieces(self, rank: int) -> list[Piece]:
        """Return what lies in a partition."""
        begin, found = rank * self.partition_size, []
        for unit, offset in zip(self.units, self.offsets, strict=True):
            for native in unit:
                start = max(begin - offset, 0)
                stop = min(begin + self.partition_size - offset, native.numel())
                if start < stop:
                    found.append(Piece(native.name, start, stop - start, offset + start - begin))
                offset += native.numel()
        return found

    def whole_pieces(self, rank: int) -> list[Piece]:
        """Return what lies in a tensor of all units that a partition has a part of."""
        begin, at, found = rank * self.partition_size, 0, []
        for unit, offset in zip(self.units, self.offsets, strict=True):
            if offset < begin + self.partition_size and offset + _numel(unit) > begin:
                for native in unit:
                    found.append(Piece(native.name, 0, native.numel(), at))
                    at += native.numel()
        return found

    def slice_mapping(self, rank: int) -> OrderedDict[str, fragment_address]:
        """Return the group's part of ``param_slice_mappings`` of a native layout."""
        begin, found = rank * self.partition_size, OrderedDict()
        for native, offset in self.linked:
            start = max(offset, begin)
            stop = min(offset + native.numel(), begin + self.partition_size)
            if start < stop:
                found[native.name] = fragment_address(start=start - begin, numel=stop - start)
        return found


def _numel(unit: Sequence[NativeParameter]) -> int:
    return sum(native.numel() for native in unit)


def flatten(
    units: Sequence[list[NativeParameter]],
    num_partitions: int,
    *,
    alignment: int = 1,
    end_alignment: int = 1,
    is_round_robin: bool = False,
) -> FlatGroup:
    """Lay out a group as DeepSpeed does.

    Args:
        units: the native parameters of each parameter of the optimizer.
        num_partitions: ranks of the group's process group.
        alignment: of a unit, in elements.
        end_alignment: of the whole group, in elements.
        is_round_robin: deal the units out to the partitions first.

    Source: ``deepspeed/runtime/zero/stage_1_and_2.py``, the loop of DeepSpeedZeroOptimizer's
    constructor, _round_robin_reorder, _link_all_hp_params.
    """
    order = list(range(len(units)))
    if is_round_robin:
        order = [i for rank in range(num_partitions) for i in order[rank::num_partitions]]
    offsets, paddings, at = [], [], 0
    for place, index in enumerate(order):
        offsets.append(at)
        at += _numel(units[index])
        paddings.append(0 if place == len(order) - 1 else -at % alignment)
        at += paddings[-1]
    # Where there are no paddings DeepSpeed links parameters by their order before dealing out.
    if any(paddings):
        starts = {index: offset for index, offset in zip(order, offsets, strict=True)}
        starts = [starts[index] for index in range(len(units))]
    else:
        starts = [0, *itertools.accumulate(_numel(unit) for unit in units)]
    return FlatGroup(
        units=[units[index] for index in order],
        offsets=offsets,
        paddings=paddings,
        size=math.ceil(at / end_alignment) * end_alignment,
        num_partitions=num_partitions,
        linked=[(unit[0], start) for unit, start in zip(units, starts, strict=False)],
    )


class Move(NamedTuple):
    """Elements to copy from one rank's tensor to another's."""

    source_rank: int
    source: int
    source_offset: int
    target_rank: int
    target: int
    target_offset: int
    numel: int


Pieces = Sequence[Sequence[Sequence[Piece]]]  # by rank, then by tensor


def plan_moves(sources: Pieces, targets: Pieces) -> list[Move]:
    """Return the copies that fill all ranks' target tensors from all ranks' source tensors.

    Where several ranks hold an element, it is the target's rank that gives it, or the first.
    """
    held: dict[str, list[tuple[int, int, Piece]]] = {}
    for rank, tensors in enumerate(sources):
        for index, pieces in enumerate(tensors):
            for piece in pieces:
                held.setdefault(piece.name, []).append((rank, index, piece))
    moves = []
    for rank, tensors in enumerate(targets):
        for index, pieces in enumerate(tensors):
            for piece in pieces:
                start, stop = piece.start, piece.start + piece.numel
                for source_rank, source, other in sorted(
                    held[piece.name], key=lambda h: (h[2].start, h[0] != rank, h[0])
                ):
                    end = min(other.start + other.numel, stop)
                    if other.start <= start < end:
                        offset = other.offset + start - other.start
                        to = piece.offset + start - piece.start
                        moves.append(
                            Move(source_rank, source, offset, rank, index, to, end - start)
                        )
                        start = end
                assert start == stop, f"{piece} is on no rank"
    return moves


def run_moves(
    moves: Sequence[Move],
    sources: Sequence[Tensor | None],
    sizes: Sequence[int],
    dtype: torch.dtype,
    process_group: Any,
) -> list[Tensor]:
    """Copy; collective over the process group where elements go from rank to rank.

    Args:
        moves: the same on all ranks.
        sources: this rank's flat tensors; None where it has none.
        sizes: elements of this rank's target tensors.
        dtype: of the targets.
        process_group: None for a single rank.

    Returns:
        The targets, on the CPU; 0 where nothing was copied to.
    """
    rank = 0 if process_group is None else dist.get_rank(group=process_group)
    sources = [None if t is None else t.detach().reshape(-1).cpu() for t in sources]
    targets = [torch.zeros(size, dtype=dtype) for size in sizes]

    def part(move: Move) -> Tensor:
        return sources[move.source].narrow(0, move.source_offset, move.numel).to(dtype)

    def put(move: Move, values: Tensor) -> None:
        targets[move.target].narrow(0, move.target_offset, move.numel).copy_(values)

    away = [move for move in moves if move.source_rank != move.target_rank]
    for move in moves:
        if move.source_rank == move.target_rank == rank:
            put(move, part(move))
    if not away:
        return targets
    ranks = range(dist.get_world_size(group=process_group))
    outgoing = [[m for m in away if (m.source_rank, m.target_rank) == (rank, r)] for r in ranks]
    incoming = [[m for m in away if (m.source_rank, m.target_rank) == (r, rank)] for r in ranks]
    device = get_accelerator().current_device_name()
    parts = [part(move) for moves_to in outgoing for move in moves_to]
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
        put(move, values)
    return targets
