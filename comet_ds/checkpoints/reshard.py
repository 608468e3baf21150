# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint for another number of ranks and another ep_size, including optimizer state.

The files with weights do not depend on either number. The optimizer's tensors are cut and joined
element by element; nothing is computed. The result is the checkpoint that a run with the new layout
would have saved, so DeepSpeed's layer and comet_ds's both resume from it. Only one of the new
optimizer files is in memory at a time; the old ones are read when needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from comet_ds.checkpoints.entries import Groups, native
from comet_ds.checkpoints.files import (
    BF16,
    FP16_FLAT,
    FP16_UNFUSED,
    MODEL_FILE,
    ZERO,
    Checkpoint,
    offsets,
    to_global,
)
from comet_ds.checkpoints.flat_groups import FlatGroup, Fragment, plan_moves
from comet_ds.checkpoints.flat_states import partition_facts
from comet_ds.checkpoints.groups import (
    Elements,
    ep_size_of,
    find_clusters,
    lay_out,
    partition_of,
    read_entries,
    read_groups,
)
from comet_ds.checkpoints.layout import NativeParameter, split_experts
from comet_ds.checkpoints.names import Topology, parse, resize
from comet_ds.checkpoints.states import (
    MASTERS,
    copy_common,
    put_step,
    regroup_scheduler,
    settings_of,
    take_step,
)


def reshard(
    source: Checkpoint,
    target: str | Path,
    *,
    ep_size: int,
    num_ranks: int,
) -> Path:
    """Write a checkpoint for another layout.

    Args:
        source: the checkpoint to reshard.
        target: folder to give to ``load_checkpoint``; the tag is the source's.
        ep_size: new ep_size of all layers.
        num_ranks: number of data parallel ranks of the run that will resume.

    Returns:
        The folder of the tag.

    Raises:
        ValueError: the sizes do not divide each other, the target exists, or the checkpoint cannot
            be converted.
    """
    folder = Path(target) / source.folder.name
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists already")
    if source.settings is None:
        raise ValueError(
            f"the settings of the run that saved {source.folder} must be known, but it only has "
            f"the path {source.model['ds_config']}, which is no file here: give them with --config"
        )
    plan = _Plan(source, ep_size, num_ranks)
    folder.mkdir(parents=True, exist_ok=True)
    for layer in source.layers:
        for path in layer.paths:
            shutil.copyfile(path, folder / path.name)
    first = None
    if source.kind is not None:
        for number in range(plan.num_files):
            state = plan.optimizer_state(number)
            first = state if number == 0 else first
            file = {**source.optimizer_file(0), source.optimizer_key: state}
            torch.save(file, folder / source.optimizer_name(number))
    torch.save(plan.model_state(first), folder / MODEL_FILE)
    (Path(target) / "latest").write_text(source.folder.name)
    return folder


class _Plan:
    """The new layout, and the content of each new file."""

    def __init__(self, source: Checkpoint, ep_size: int, num_ranks: int) -> None:
        self.source = source
        self.ep_sizes = _new_sizes(source, ep_size, num_ranks)
        self.topology = Topology(num_ranks, source.topology.is_data_first)
        self.counts = tuple(source.local_experts(s) for s in (source.ep_sizes, self.ep_sizes))
        self.num_files = num_ranks
        if not source.is_partitioned:
            self.num_files = max(self.ep_sizes.values(), default=source.num_optimizer_files)
        if source.kind is None:
            return
        self.groups: Groups = []  # of the new optimizer, with rank 0's names
        self.clusters: list[tuple[list[int], list[int]]] = []  # numbers of old and new groups
        is_flat = source.kind in (ZERO, BF16, FP16_FLAT)
        self.elements = Elements.of(source) if is_flat else None
        self.old_groups = read_groups(source) if self.elements is None else self.elements.groups
        self._regroup()
        self.layouts: list[FlatGroup] = []
        if is_flat:
            self.layouts = lay_out(source, self.groups, self.topology)

    def _regroup(self) -> None:
        """Determine the new optimizer's groups."""
        for count, params, is_divided in find_clusters(self.source, self.old_groups):
            made = [self._resize(params)]
            if is_divided:
                made = split_experts([{"params": made[0]}])
            trained = self._resize([param for group in self.old_groups for param in group])
            trained = {param.name for param in trained}
            made = [[param for param in group if param.name in trained] for group in made]
            made = [group for group in made if group]
            first = sum(len(olds) for olds, _ in self.clusters)
            new = list(range(len(self.groups), len(self.groups) + len(made)))
            self.clusters.append((list(range(first, first + count)), new))
            self.groups += made

    def _resize(self, params: Sequence[NativeParameter]) -> list[NativeParameter]:
        by_name = {param.name: param for param in params}
        found = []
        for name, old in resize([param.name for param in params], *self.counts):
            parts = parse(name)
            size = parts and self.ep_sizes[parts.layer]
            found.append(native(name, by_name[old].shape, size))
        return found

    # ---- the optimizer's files -----------------------------------------------------------------

    def optimizer_state(self, number: int) -> Any:
        """Return the optimizer's state_dict for one of the new files."""
        source, rank = self.source, number
        state = source.optimizer(0)
        if not source.is_partitioned:
            rank = self.topology.writer(number, self.num_files)
        first = offsets(source, self.ep_sizes, self.topology, rank)
        if self.elements is None:
            entries, masters = self._entries(first)
        else:
            parts = [0] * len(self.groups)
            if source.is_partitioned:
                parts = [partition_of(group, self.topology, rank) for group in self.groups]
            entries, masters = self._flat_entries(first, parts)
            if source.is_partitioned:
                flats = list(zip(self.layouts, parts, strict=True))
                facts = partition_facts(flats, source.kind == ZERO)
                state = {**state, **{key: facts[key] for key in facts if key in state}}
                if source.kind == ZERO:
                    masters = [
                        m[: flat.partition_size - flat.padding_of(part)].clone()
                        for m, (flat, part) in zip(masters, flats, strict=True)
                    ]
        base = {**source.base(0), **self._pack(entries)}
        if source.base_key is None:
            return base
        return {**state, source.base_key: base, source.masters_key: masters}

    def _pack(self, entries: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Return the groups and states of a torch optimizer's state_dict."""
        settings, states, groups, number = self.source.param_groups(0), {}, [], 0
        for olds, news in self.clusters:
            for index in news:
                group = dict(settings[olds[0]])
                if ep_size := ep_size_of(self.groups[index]):
                    group["name"] = f"ep_size_{ep_size}" if group.get("moe") else group["name"]
                if "param_names" in group:
                    group["param_names"] = [param.name for param in self.groups[index]]
                group["params"] = list(range(number, number + len(entries[index])))
                states |= {number + i: e for i, e in enumerate(entries[index]) if e}
                number += len(entries[index])
                groups.append(group)
        return {"state": states, "param_groups": groups}

    def _entries(
        self, first: Mapping[str, int]
    ) -> tuple[list[list[dict[str, Any]]], list[list[Tensor]]]:
        """Return states and fp32 weights of an optimizer with a state per parameter, by group."""
        source, by_group = self.source, read_entries(self.source, self.old_groups)
        has_masters = source.kind == FP16_UNFUSED
        entries, masters = [], []
        settings = source.param_groups(0)
        for olds, news in self.clusters:
            found = {name: entry for index in olds for name, entry in by_group[index].items()}
            is_fused = _is_fused_adam(settings[olds[0]])
            step = take_step(found) if is_fused and ep_size_of(self.groups[news[0]]) else None
            for index in news:
                of_group = [dict(found[to_global(p.name, first)]) for p in self.groups[index]]
                if step is not None:
                    put_step(of_group, step, settings[olds[0]].get("step", 0))
                masters.append([e.pop(MASTERS) for e in of_group] if has_masters else [])
                entries.append(of_group)
        return entries, masters

    def _flat_entries(
        self, first: Mapping[str, int], parts: Sequence[int]
    ) -> tuple[list[list[dict[str, Any]]], list[Tensor]]:
        """Return states and fp32 weights of flattened groups for one file.

        Args:
            first: the result of ``offsets`` for the file's rank.
            parts: index of the rank's partition of each group.
        """
        entries: list[list[dict[str, Any]]] = [[{}] for _ in self.groups]
        masters: list[Tensor] = []
        for olds, news in self.clusters:
            for kind, values in self._kinds(olds).items():
                for index in news:
                    if kind == MASTERS:
                        masters.append(self._move(kind, index, parts[index], first))
                    elif _is_flat(values[0]):
                        entries[index][0][kind] = self._move(kind, index, parts[index], first)
                    else:
                        what = f"the optimizer's {kind!r}"
                        entries[index][0][kind] = copy_common(values, what)
        return entries, masters

    def _kinds(self, olds: Sequence[int]) -> dict[str, list[Any]]:
        """Return the values of some old groups in all files, by kind."""
        found: dict[str, list[Any]] = {MASTERS: [None]}
        for file in range(self.source.num_optimizer_files):
            for index in olds:
                for key, value in self._flat_entry(file, index).items():
                    found.setdefault(key, []).append(value)
        return found

    def _flat_entry(self, file: int, index: int) -> Mapping[str, Any]:
        base = self.source.base(file)
        return base["state"].get(base["param_groups"][index]["params"][0], {})

    def _move(self, kind: str, index: int, part: int, first: Mapping[str, int]) -> Tensor:
        """Return one kind of flat tensor of a rank's partition of a new group."""
        source, flat, elements = self.source, self.layouts[index], self.elements
        assert elements is not None, "flat optimizers have elements"
        is_whole = self._is_whole(kind, index)
        fragments = flat.whole_fragments(part) if is_whole else flat.fragments(part)
        fragments = [p._replace(name=to_global(p.name, first)) for p in fragments]
        size = sum(fragment.numel for fragment in fragments) if is_whole else flat.partition_size
        places = elements.whole_places() if is_whole else elements.places
        sources: list[Any] = []
        held: list[list[list[Fragment]]] = []
        for fragment in fragments:
            for place in places[fragment.name]:
                sources.append((place.file, place.group))
                held.append([[place.fragment]])
        result = None
        for move in plan_moves(held, [[fragments]]):
            file, group = sources[move.source_rank]
            if kind == MASTERS:
                tensor = source.optimizer(file)[source.masters_key][group].detach()
            else:
                tensor = self._flat_entry(file, group)[kind]
            if result is None:
                result = torch.zeros(size, dtype=tensor.dtype)
            values = tensor.view(-1).narrow(0, move.source_offset, move.numel)
            result.narrow(0, move.target_offset, move.numel).copy_(values)
        if result is None:
            dtype = torch.float32 if kind == MASTERS else self._dtype(kind, index)
            result = torch.zeros(size, dtype=dtype)
        return result

    def _dtype(self, kind: str, index: int) -> torch.dtype:
        olds = next(olds for olds, news in self.clusters if index in news)
        return next(v.dtype for v in self._kinds(olds)[kind])

    def _is_whole(self, kind: str, index: int) -> bool:
        """Return whether a state holds whole parameters, those that a partition overlaps.

        Source: ``deepspeed/runtime/zero/stage_1_and_2.py``, get_flat_partition: momentum of
        DeepSpeed's Muon where the optimizer is not offloaded.
        """
        olds = next(olds for olds, news in self.clusters if index in news)
        device = self.source.setting("zero_optimization", "offload_optimizer", "device")
        is_muon = self.source.param_groups(0)[olds[0]].get("use_muon", False)
        return kind == "momentum_buffer" and is_muon and device in (None, "none")

    # ---- the model's file ----------------------------------------------------------------------

    def model_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the content of the model's file."""
        source = self.source
        state = {**source.model, "dp_world_size": self.topology.num_ranks}
        if state.get("optimizer") is not None:
            state["optimizer"] = optimizer
        if state.get("buffer_names"):
            state["buffer_names"] = [n for n, _ in resize(state["buffer_names"], *self.counts)]
        if state.get("param_shapes"):
            old = state["param_shapes"][0]
            # Dictionary and shapes may be DeepSpeed's own: made again by classes unknown here.
            of_all, of_one = (cast(Any, type(v)) for v in (old, next(iter(old.values()))))
            state["param_shapes"] = [
                of_all((param[0].name, of_one(param[0].shape)) for param in flat.params)
                for flat in self.layouts
            ]
        for key in ("frozen_param_shapes", "frozen_param_fragments"):
            if state.get(key):
                values = [
                    (name, state[key][old] if key.endswith("shapes") else self._frozen(name))
                    for name, old in resize(list(state[key]), *self.counts)
                ]
                state[key] = type(state[key])(values)
        if state.get("shared_params"):
            state["shared_params"] = self._shared(state["shared_params"])
        if state.get("lr_scheduler") and source.kind is not None:
            counts = [(len(olds), len(news)) for olds, news in self.clusters]
            state["lr_scheduler"] = regroup_scheduler(state["lr_scheduler"], counts)
        return state

    def _frozen(self, name: str) -> Tensor:
        """Return a frozen parameter of rank 0, whose local names equal the global ones."""
        known = self.source.model["frozen_param_fragments"]
        return known[name] if parse(name) is None else self.source.tensor(name)

    def _shared(self, table: Mapping[str, str]) -> dict[str, str]:
        found = {}
        for name, old in resize(list(table), *self.counts):
            parts, other = parse(name), parse(table[old])
            found[name] = table[old]
            if parts and other:
                found[name] = str(other._replace(expert=parts.expert))
        return found


def _is_flat(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def _is_fused_adam(group: Mapping[str, Any]) -> bool:
    """Return whether a group belongs to DeepSpeed's FusedAdam, which has one step per group.

    DeepSpeed's CPUAdam has "bias_correction" too, but one step per parameter.
    """
    keys = settings_of(group)
    return "bias_correction" in keys and "step" in keys and "amsgrad" not in keys


def _new_sizes(source: Checkpoint, ep_size: int, num_ranks: int) -> dict[str, int]:
    """Return the new ep_size of each layer.

    Raises:
        ValueError: ep_size does not divide the experts or the ranks, or the layers' old sizes
            differ.
    """
    if len(set(source.ep_sizes.values())) > 1:
        raise ValueError(f"layers with different ep_size are not supported, got {source.ep_sizes}")
    if num_ranks < 1:
        raise ValueError(f"the number of ranks must be at least 1, got {num_ranks}")
    for layer in source.layers:
        if ep_size < 1 or len(layer.paths) % ep_size or num_ranks % ep_size:
            raise ValueError(
                f"ep_size must divide the number of experts ({len(layer.paths)}) and of ranks "
                f"({num_ranks}), got {ep_size}"
            )
    return dict.fromkeys(source.ep_sizes, ep_size)
