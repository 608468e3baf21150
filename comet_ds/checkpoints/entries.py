# SPDX-License-Identifier: Apache-2.0
"""Finding the parameters of an optimizer's entries at ZeRO stage 0, whose files have no names.

The entries of a group are in the model's order, so they are matched with the model's parameters one
after the other: by value if there are fp32 weights, which round to the model's, otherwise by shape.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from comet_ds.checkpoints.files import PLAIN, Checkpoint
from comet_ds.checkpoints.layout import NativeParameter
from comet_ds.checkpoints.names import parse

Groups = list[list[NativeParameter]]
UNKNOWN = "?"  # prefix of the made-up name of a parameter that no file names


def native(name: str, shape: Sequence[int], ep_size: int | None) -> NativeParameter:
    """Return a native parameter of a file.

    Args:
        name: in the model's state_dict.
        shape: of the parameter.
        ep_size: of the layer for an expert's parameter, None for others.
    """
    tags = types.SimpleNamespace(allreduce=ep_size is None, group_name=f"ep_size_{ep_size}")
    return NativeParameter(name, torch.Size(shape), tags, None)


class _Cursor:
    """The entries of a group and the number of those already matched."""

    def __init__(self, entries: Any) -> None:
        self.entries, self.at, self.found = entries, 0, []

    @property
    def is_done(self) -> bool:
        flat = torch.is_tensor(self.entries)
        return self.at == (self.entries.numel() if flat else len(self.entries))

    def take(self, name: str, own: Tensor) -> bool:
        """Match the next entry with a parameter; return whether they fit."""
        if self.is_done:
            return False
        if torch.is_tensor(self.entries):
            value = self.entries.detach()[self.at : self.at + own.numel()].view(-1)
            fits, step = torch.equal(value.to(own.dtype), own.flatten()), own.numel()
        else:
            value, step = self.entries[self.at], 1
            if isinstance(value, torch.Size | None):
                fits = value in (None, own.shape)
            else:
                fits = value.shape == own.shape and torch.equal(value.detach().to(own.dtype), own)
        if fits:
            self.at += step
            self.found.append((name, own.shape))
        return fits


def name_entries(checkpoint: Checkpoint) -> Groups:
    """Return the parameters of each group of an optimizer whose file has no names.

    Raises:
        ValueError: the entries are not in the model's order.
    """
    for skip_tied, allow_rest in ((False, False), (True, False), (False, True)):
        cursors, rest = _walk(checkpoint, skip_tied)
        if all(cursor.is_done for cursor in cursors) and (allow_rest or not rest):
            break
    settings = checkpoint.param_groups(0)
    is_split = any(group.get("moe") for group in settings)
    made = []
    for index, (cursor, group) in enumerate(zip(cursors, settings, strict=True)):
        if cursor.is_done:
            parts = [(name, shape, parse(name)) for name, shape in cursor.found]
            made.append([native(n, s, p and checkpoint.ep_sizes[p.layer]) for n, s, p in parts])
        elif is_split and not group.get("moe"):  # no expert's, so it needs no name to be resharded
            shapes = [()] * len(cursor.entries)
            if torch.is_tensor(cursor.entries):
                shapes = [cursor.entries.shape]
            names = [f"{UNKNOWN}{index}.{i}" for i in range(len(shapes))]
            made.append([native(n, s, None) for n, s in zip(names, shapes, strict=True)])
        else:
            raise ValueError(
                f"cannot tell which parameters the optimizer's group {group.get('name', index)!r} "
                f"has: the one after {[name for name, _ in cursor.found][-1:]} is not in the "
                "model's order"
            )
    return made


def _walk(checkpoint: Checkpoint, skip_tied: bool) -> tuple[list[_Cursor], list[str]]:
    """Match the model's parameters with the entries, in order.

    Args:
        checkpoint: the checkpoint.
        skip_tied: whether to skip a parameter that equals an earlier one.

    Returns:
        A cursor of each group, and the names of the parameters without an entry.
    """
    settings = checkpoint.param_groups(0)
    if checkpoint.kind == PLAIN:
        state = checkpoint.base(0)["state"]
        entries = [[_shape(state.get(i)) for i in group["params"]] for group in settings]
    else:
        entries = checkpoint.optimizer(0)[checkpoint.masters_key]
    cursors = [_Cursor(of_group) for of_group in entries]
    is_split = any(group.get("moe") for group in settings)
    local = checkpoint.local_experts(checkpoint.ep_sizes)
    buffers, rest, seen = checkpoint.buffer_names(), [], []
    for name in checkpoint.names():
        parts = parse(name)
        if name in buffers or (parts and parts.expert >= local[parts.layer]):
            continue
        own = checkpoint.tensor(name)
        if skip_tied:
            before = [t for p, t in seen if p == (parts and parts[:2]) and t.shape == own.shape]
            if any(torch.equal(own, other) for other in before):
                continue
            seen.append((parts and parts[:2], own))
        for cursor, group in zip(cursors, settings, strict=True):
            has_kind = not is_split or bool(group.get("moe")) == (parts is not None)
            if has_kind and cursor.take(name, own):
                break
        else:
            rest.append(name)
    return cursors, rest


def _shape(entry: Mapping[str, Any] | None) -> torch.Size | None:
    """Return a parameter's shape from its state, None if the state has no tensor of that shape."""
    tensors = [
        v for k, v in (entry or {}).items() if torch.is_tensor(v) and v.dim() and k != "step"
    ]
    return tensors[0].shape if tensors else None
