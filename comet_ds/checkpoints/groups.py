# SPDX-License-Identifier: Apache-2.0
"""The parameters of a checkpoint's optimizer groups, and the place of each element in its files.

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
from comet_ds.checkpoints.flat_groups import FlatGroup, Fragment, flatten
from comet_ds.checkpoints.flat_states import PARAM_ALIGNMENT_PADDINGS
from comet_ds.checkpoints.layout import NativeParameter, have_same_settings, split_experts
from comet_ds.checkpoints.names import Topology, parse
from comet_ds.checkpoints.states import MASTERS


def ep_size_of(group: Sequence[NativeParameter]) -> int | None:
    """Return the ep_size of a group's layers, None for a group without experts."""
    if group[0].allreduce:
        return None
    return int(group[0].group_name.removeprefix("ep_size_"))


def read_groups(checkpoint: Checkpoint) -> Groups:
    """Return the parameters of each group of the optimizer, in its order, with rank 0's names.

    Raises:
        ValueError: the parameters cannot be determined from the files.
    """
    if not checkpoint.is_partitioned:
        return name_entries(checkpoint)
    groups = []
    for shapes in checkpoint.model["param_shapes"]:
        group = []
        for name, shape in shapes.items():
            parts = parse(name)
            group.append(native(name, shape, parts and checkpoint.ep_sizes[parts.layer]))
        if is_round_robin(checkpoint):  # undo the dealing out, which param_shapes has
            num_ranks = num_partitions(checkpoint, group, checkpoint.topology)
            order = list(range(len(group)))
            order = [i for rank in range(num_ranks) for i in order[rank::num_ranks]]
            group = [n for _, n in sorted(zip(order, group, strict=True), key=lambda x: x[0])]
        groups.append(group)
    return groups


def find_clusters(
    checkpoint: Checkpoint, groups: Groups
) -> list[tuple[int, list[NativeParameter], bool]]:
    """Join the groups that DeepSpeed has split at its size limit.

    Groups are joined if their settings are equal and DeepSpeed's function splits their parameters
    into the same groups again. The function also gets frozen parameters, which are left out of the
    groups afterwards.

    Args:
        checkpoint: the checkpoint.
        groups: the result of ``read_groups``.

    Returns:
        For each cluster the number of groups, their parameters, and whether DeepSpeed splits them
        at its limit; if so, frozen parameters are included.
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
    """Return the parameters that DeepSpeed splits into exactly these groups, None if it cannot."""
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
    """Return experts' parameters and the frozen ones that no group has, in the model's order."""
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


# ---- the place of each element of flattened groups ---------------------------------------------


def is_round_robin(checkpoint: Checkpoint) -> bool:
    """Return whether parameters were dealt out to the partitions."""
    return bool(checkpoint.setting("zero_optimization", "round_robin_gradients"))


def num_partitions(
    checkpoint: Checkpoint, group: Sequence[NativeParameter], topology: Topology
) -> int:
    """Return the number of partitions of a flattened group."""
    if not checkpoint.is_partitioned:
        return 1
    return topology.num_ranks // (ep_size_of(group) or 1)


def partition_of(group: Sequence[NativeParameter], topology: Topology, rank: int) -> int:
    """Return the index of a rank's partition of a group."""
    ep_size = ep_size_of(group)
    return rank if ep_size is None else topology.expert_dp_rank(rank, ep_size)


def lay_out(checkpoint: Checkpoint, groups: Groups, topology: Topology) -> list[FlatGroup]:
    """Return the layouts of groups that the checkpoint's kind of optimizer flattens.

    Args:
        checkpoint: gives the kind and the settings.
        groups: parameters of each group.
        topology: the ranks of the layout, not necessarily the checkpoint's.
    """
    layouts = []
    for group in groups:
        alignment, count = 1, num_partitions(checkpoint, group, topology)
        options: dict[str, Any] = {}
        if checkpoint.is_partitioned:
            options["end_alignment"] = 2 * count  # DeepSpeed's nccl_start_alignment_factor
        if checkpoint.kind == ZERO:
            options["is_round_robin"] = is_round_robin(checkpoint)
            if checkpoint.setting("zero_optimization", "parameter_alignment"):  # to 16 bytes
                alignment = max(16 // _element_size(checkpoint, group), 1)
        params = [[native] for native in group]
        layouts.append(flatten(params, count, alignment=alignment, **options))
    return layouts


def _element_size(checkpoint: Checkpoint, group: Sequence[NativeParameter]) -> int:
    saved = set(checkpoint.names())
    return next(checkpoint.tensor(n.name).element_size() for n in group if n.name in saved)


class Place(NamedTuple):
    """Place of a fragment: number of the optimizer file and index of the group in it."""

    file: int
    group: int
    fragment: Fragment


@dataclass(frozen=True)
class Elements:
    """The places of all elements of a checkpoint's flattened optimizer groups.

    Attributes:
        checkpoint: the checkpoint.
        groups: parameters of each group, with rank 0's names.
        layouts: layouts of the groups.
        places: places of each parameter by global name.
    """

    checkpoint: Checkpoint
    groups: Groups
    layouts: list[FlatGroup]
    places: dict[str, list[Place]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Elements:
        """Find the elements of a checkpoint.

        Raises:
            ValueError: a file's layout is not the one that follows from its settings.
        """
        groups = read_groups(checkpoint)
        layouts = lay_out(checkpoint, groups, checkpoint.topology)
        places: dict[str, list[Place]] = {}
        for file in range(checkpoint.num_optimizer_files):
            _check_layout(checkpoint, file, groups, layouts)
            rank, first = _rank_of(checkpoint, file)
            for index, (group, flat) in enumerate(zip(groups, layouts, strict=True)):
                for fragment in flat.fragments(_part(checkpoint, group, rank)):
                    fragment = fragment._replace(name=to_global(fragment.name, first))
                    places.setdefault(fragment.name, []).append(Place(file, index, fragment))
        elements = cls(checkpoint, groups, layouts, places)
        elements._check_weights()
        return elements

    def whole_places(self) -> dict[str, list[Place]]:
        """Return the places of each parameter in tensors that hold whole parameters."""
        found: dict[str, list[Place]] = {}
        for file in range(self.checkpoint.num_optimizer_files):
            rank, first = _rank_of(self.checkpoint, file)
            for index, (group, flat) in enumerate(zip(self.groups, self.layouts, strict=True)):
                for fragment in flat.whole_fragments(_part(self.checkpoint, group, rank)):
                    fragment = fragment._replace(name=to_global(fragment.name, first))
                    found.setdefault(fragment.name, []).append(Place(file, index, fragment))
        return found

    def weights(self, name: str) -> Tensor:
        """Return a parameter's fp32 weights, flat."""
        places = sorted(self.places[name], key=lambda place: place.fragment.start)
        parts, end = [], 0
        for file, group, fragment in places:
            if fragment.start == end:  # skips elements that several files hold
                flat = self.checkpoint.optimizer(file)[self.checkpoint.masters_key][group]
                parts.append(flat.detach().narrow(0, fragment.offset, fragment.numel))
                end += fragment.numel
        return torch.cat(parts)

    def _check_weights(self) -> None:
        """Compare one expert's weights per file with the model's, to detect another rank order."""
        checkpoint, seen = self.checkpoint, set()
        for name, places in self.places.items():
            if parse(name) is None or places[0].file in seen:
                continue
            seen.add(places[0].file)
            weights, own = self.weights(name), checkpoint.tensor(name).flatten()
            if not torch.equal(weights.to(own.dtype), own):
                raise ValueError(
                    f"the optimizer's fp32 weights of {name} are not the model's: the weights were "
                    "changed after the last step, or the checkpoint was saved with a setting that "
                    "it does not record, such as use_data_before_expert_parallelism"
                )


def _rank_of(checkpoint: Checkpoint, file: int) -> tuple[int, dict[str, int]]:
    """Return the rank that wrote an optimizer file, and its ``offsets``."""
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
    """Return the states of an optimizer that has one state per parameter.

    Args:
        checkpoint: a checkpoint of such an optimizer.
        groups: the result of ``read_groups``.

    Returns:
        For each group the states by global name of the parameter.
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
    """Return a tensor whose storage holds nothing else, so that nothing else is saved with it."""
    if torch.is_tensor(value) and value.untyped_storage().nbytes() > value.nbytes:
        return value.clone()
    return value
