# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's optimizer tensors hold: names, by groups, and where each element lies.

Files of partitioned optimizers (ZeRO 1 and 2, BF16_Optimizer) name their parameters; for others see
``entries.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comet_ds.checkpoints.entries import Groups, name_entries, native
from comet_ds.checkpoints.files import ZERO, Checkpoint, offsets, to_global
from comet_ds.checkpoints.flat_groups import FlatGroup, Piece, flatten
from comet_ds.checkpoints.flat_states import PARAM_ALIGNMENT_PADDINGS
from comet_ds.checkpoints.layout import NativeParameter, have_same_settings, split_experts
from comet_ds.checkpoints.names import Topology, parse
from comet_ds.checkpoints.states import MASTERS


def ep_size_of(group: Sequence[NativeParameter]) -> int | None:
    """Return the ep_size of a group's layers; None for what is no expert's."""
    if group[0].allreduce:
        return None
    return int(group[0].group_name.removeprefix("ep_size_"))


def read_groups(checkpoint: Checkpoint) -> Groups:
    """Return the parameters of each group of the optimizer, in its order, with rank 0's names.

    Raises:
        ValueError: the file does not say which they are.
    """
    if not checkpoint.is_partitioned:
        return name_entries(checkpoint)
    groups = []
    for shapes in checkpoint.model["param_shapes"]:
        group = []
        for name, shape in shapes.items():
            parts = parse(name)
            group.append(native(name, shape, parts and checkpoint.ep_sizes[parts.layer]))
        if is_round_robin(checkpoint):  # param_shapes has them dealt out
            num_ranks = num_partitions(checkpoint, group, checkpoint.topology)
            order = list(range(len(group)))
            order = [i for rank in range(num_ranks) for i in order[rank::num_ranks]]
            group = [n for _, n in sorted(zip(order, group, strict=True), key=lambda x: x[0])]
        groups.append(group)
    return groups


def find_clusters(
    checkpoint: Checkpoint, groups: Groups
) -> list[tuple[int, list[NativeParameter], bool]]:
    """Join the groups that DeepSpeed's limit has split.

    They are recognised by their equal settings, and by DeepSpeed's function giving the groups at
    hand. It is applied to frozen parameters as well, which are left out of the groups afterwards.

    Returns:
        How many groups are joined, their parameters, and whether DeepSpeed splits them by its
        limit: then with those that are frozen.
    """
    settings, found, begin = checkpoint.param_groups(0), [], 0
    grouped = {param.name for group in groups for param in group}
    while begin < len(groups):
        cluster = 1, groups[begin], False
        if settings[begin].get("moe"):
            stops = range(len(groups), begin, -1)
            same = [stop for stop in stops if have_same_settings(settings[begin:stop])]
            tried = ((stop, _divided(checkpoint, groups[begin:stop], grouped)) for stop in same)
            cluster = next(((stop - begin, ps, True) for stop, ps in tried if ps), cluster)
        found.append(cluster)
        begin += cluster[0]
    return found


def _divided(
    checkpoint: Checkpoint, groups: Groups, grouped: set[str]
) -> list[NativeParameter] | None:
    """Return what DeepSpeed makes some groups of by its limit; None where it makes others."""
    joined = [param for group in groups for param in group]
    for params in (_with_frozen(checkpoint, joined, grouped), joined):
        trained = [
            [p.name for p in g if p.name in grouped] for g in split_experts([{"params": params}])
        ]
        if [g for g in trained if g] == [[p.name for p in group] for group in groups]:
            return params
    return None


def _with_frozen(
    checkpoint: Checkpoint, joined: Sequence[NativeParameter], grouped: set[str]
) -> list[NativeParameter]:
    """Return experts' parameters together with those that no group has, in the model's order."""
    size, known = ep_size_of(joined), {param.name: param for param in joined}
    local, buffers = checkpoint.local_experts(checkpoint.ep_sizes), checkpoint.buffer_names()
    tied = set(checkpoint.model.get("shared_params") or {})
    found = []
    for name in checkpoint.names():
        parts = parse(name)
        if parts is None or checkpoint.ep_sizes.get(parts.layer) != size:
            continue
        if name in known:
            found.append(known[name])
        elif parts.expert < local[parts.layer] and name not in buffers | tied | grouped:
            found.append(native(name, checkpoint.tensor(name).shape, size))
    return found


# ---- where each element of flattened groups lies -----------------------------------------------


def is_round_robin(checkpoint: Checkpoint) -> bool:
    """Return whether parameters were dealt out to the partitions."""
    return bool(checkpoint.setting("zero_optimization", "round_robin_gradients"))


def num_partitions(
    checkpoint: Checkpoint, group: Sequence[NativeParameter], topology: Topology
) -> int:
    """Return how many parts a flattened group is cut into."""
    if not checkpoint.is_partitioned:
        return 1
    return topology.num_ranks // (ep_size_of(group) or 1)


def partition_of(group: Sequence[NativeParameter], topology: Topology, rank: int) -> int:
    """Return which partition of a group a rank has."""
    ep_size = ep_size_of(group)
    return rank if ep_size is None else topology.expert_dp_rank(rank, ep_size)


def lay_out(checkpoint: Checkpoint, groups: Groups, topology: Topology) -> list[FlatGroup]:
    """Return how an optimizer like the checkpoint's flattens groups on some ranks."""
    layouts = []
    for group in groups:
        alignment, count = 1, num_partitions(checkpoint, group, topology)
        options: dict[str, Any] = {}
        if checkpoint.is_partitioned:
            options["end_alignment"] = 2 * count  # DeepSpeed's nccl_start_alignment_factor
        if checkpoint.kind == ZERO:
            options["is_round_robin"] = is_round_robin(checkpoint)
            if checkpoint.setting("zero_optimization", "parameter_alignment"):  # 16 bytes
                alignment = max(16 // _element_size(checkpoint, group), 1)
        units = [[native] for native in group]
        layouts.append(flatten(units, count, alignment=alignment, **options))
    return layouts


def _element_size(checkpoint: Checkpoint, group: Sequence[NativeParameter]) -> int:
    saved = set(checkpoint.names())
    return next(checkpoint.tensor(n.name).element_size() for n in group if n.name in saved)


class Place(NamedTuple):
    """Part of a parameter in one optimizer file."""

    file: int
    group: int
    piece: Piece


@dataclass(frozen=True)
class Elements:
    """Where a checkpoint has each element of its optimizer's flattened groups.

    Attributes:
        checkpoint: it.
        groups: the parameters, as on rank 0.
        layouts: of the groups.
        places: by name, counted over all ranks.
    """

    checkpoint: Checkpoint
    groups: Groups
    layouts: list[FlatGroup]
    places: dict[str, list[Place]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Elements:
        """Find them.

        Raises:
            ValueError: a file has another layout than its settings make.
        """
        groups = read_groups(checkpoint)
        layouts = lay_out(checkpoint, groups, checkpoint.topology)
        places: dict[str, list[Place]] = {}
        for file in range(checkpoint.num_optimizer_files):
            _check_layout(checkpoint, file, groups, layouts)
            rank, first = _rank_of(checkpoint, file)
            for index, (group, flat) in enumerate(zip(groups, layouts, strict=True)):
                for piece in flat.pieces(_part(checkpoint, group, rank)):
                    piece = piece._replace(name=to_global(piece.name, first))
                    places.setdefault(piece.name, []).append(Place(file, index, piece))
        elements = cls(checkpoint, groups, layouts, places)
        elements._check_weights()
        return elements

    def whole_places(self) -> dict[str, list[Place]]:
        """Return where tensors of whole parameters have each parameter."""
        found: dict[str, list[Place]] = {}
        for file in range(self.checkpoint.num_optimizer_files):
            rank, first = _rank_of(self.checkpoint, file)
            for index, (group, flat) in enumerate(zip(self.groups, self.layouts, strict=True)):
                for piece in flat.whole_pieces(_part(self.checkpoint, group, rank)):
                    piece = piece._replace(name=to_global(piece.name, first))
                    found.setdefault(piece.name, []).append(Place(file, index, piece))
        return found

    def weights(self, name: str) -> Tensor:
        """Return a parameter's fp32 weights, flat."""
        places = sorted(self.places[name], key=lambda place: place.piece.start)
        parts, end = [], 0
        for file, group, piece in places:
            if piece.start == end:  # some are in several files
                flat = self.checkpoint.optimizer(file)[self.checkpoint.masters_key][group]
                parts.append(flat.detach().narrow(0, piece.offset, piece.numel))
                end += piece.numel
        return torch.cat(parts)

    def _check_weights(self) -> None:
        """Check of each file one expert's weights against the model's: its ranks may be others."""
        checkpoint, seen = self.checkpoint, set()
        for name, places in self.places.items():
            if parse(name) is None or places[0].file in seen:
                continue
            seen.add(places[0].file)
            weights, own = self.weights(name), checkpoint.tensor(name).flatten()
            if not torch.equal(weights.to(own.dtype), own):
                raise ValueError(
                    f"the optimizer's fp32 weights of {name} are not the model's: the weights were "
                    "changed after the last step, or the checkpoint was saved with settings that "
                    "it does not have, such as use_data_before_expert_parallelism"
                )


def _rank_of(checkpoint: Checkpoint, file: int) -> tuple[int, dict[str, int]]:
    """Return the rank that wrote an optimizer file, and its first experts."""
    topology, rank = checkpoint.topology, file
    if not checkpoint.is_partitioned:
        rank = topology.writer(file, checkpoint.num_optimizer_files)
    return rank, offsets(checkpoint, checkpoint.ep_sizes, topology, rank)


def _part(checkpoint: Checkpoint, group: Sequence[NativeParameter], rank: int) -> int:
    return partition_of(group, checkpoint.topology, rank) if checkpoint.is_partitioned else 0


def _check_layout(
    checkpoint: Checkpoint, file: int, groups: Groups, layouts: Sequence[FlatGroup]
) -> None:
    state = checkpoint.optimizer(file)
    sizes = [tensor.numel() for tensor in state[checkpoint.masters_key]]
    rank, _ = _rank_of(checkpoint, file)
    expected = [flat.partition_size for flat in layouts]
    if checkpoint.kind == ZERO:
        parts = [_part(checkpoint, group, rank) for group in groups]
        expected = [
            flat.partition_size - flat.padding_of(p) for flat, p in zip(layouts, parts, strict=True)
        ]
    paddings = [flat.paddings for flat in layouts]
    if sizes != expected or state.get(PARAM_ALIGNMENT_PADDINGS, paddings) != paddings:
        raise ValueError(
            f"{checkpoint.optimizer_name(file)} has groups of {sizes} elements, expected "
            f"{expected} with the settings in {checkpoint.folder}"
        )


def read_entries(checkpoint: Checkpoint, groups: Groups) -> list[dict[str, dict[str, Any]]]:
    """Return the states of an optimizer with one for each parameter.

    Args:
        checkpoint: of such an optimizer.
        groups: what ``read_groups`` returns.

    Returns:
        For each group the states by the parameters' names, counted over all ranks.
    """
    found: list[dict[str, dict[str, Any]]] = [{} for _ in groups]
    for file in range(checkpoint.num_optimizer_files):
        _, first = _rank_of(checkpoint, file)
        base, masters = checkpoint.base(file), None
        if checkpoint.masters_key is not None:
            masters = checkpoint.optimizer(file)[checkpoint.masters_key]
        for index, params in enumerate(groups):
            numbers = base["param_groups"][index]["params"]
            for place, (number, param) in enumerate(zip(numbers, params, strict=True)):
                entry = {k: _own(v) for k, v in base["state"].get(number, {}).items()}
                if masters is not None:
                    entry[MASTERS] = _own(masters[index][place])
                found[index].setdefault(to_global(param.name, first), entry)
    return found


def _own(value: Any) -> Any:
    """Return a tensor with a storage that ends where it does, so that only it is saved."""
    if torch.is_tensor(value) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value
