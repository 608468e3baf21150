# SPDX-License-Identifier: Apache-2.0
"""Splitting a user's optimizer into the groups that DeepSpeed requires: experts marked "moe"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.utils import (
    is_moe_param,
    is_moe_param_group,
    split_params_into_different_moe_groups_for_optimizer,
)

from comet_ds._compat.deepspeed import Engine

# Attributes of torch's learning rate schedulers that have one value per group of the optimizer.
PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums",
             "max_momentums")  # fmt: skip
# Attributes that DeepSpeed's schedulers compute from them.
_DERIVED = ("delta_lrs", "org_lrs")
_ORIGIN = "comet_ds_origin"  # temporary key of a group: index of the group it was split from


def split_expert_groups(
    optimizer: torch.optim.Optimizer, lr_scheduler: Any = None
) -> torch.optim.Optimizer:
    """Move the experts to groups of their own, with the settings of their present groups.

    Needed with ZeRO 1 or 2 and an optimizer that was made before ``deepspeed.initialize``, as
    Hugging Face's Trainer and Accelerate do. ``comet_ds.initialize`` calls it. The optimizer's
    state is kept. Does nothing if all experts are in groups marked "moe".

    Args:
        optimizer: changed in place.
        lr_scheduler: torch scheduler that was made for the optimizer, if any; changed in place.

    Returns:
        The optimizer.

    Raises:
        ValueError: the groups have an "initial_lr", so a scheduler was made, and it was not given.

    Source: ``deepspeed/moe/utils.py``.
    """
    groups = optimizer.param_groups
    if not num_unmarked(optimizer):
        return optimizer
    if lr_scheduler is None and any("initial_lr" in group for group in groups):
        raise ValueError(
            "the experts must be split off the optimizer's groups before a learning rate scheduler "
            "is made for it, or the scheduler must be given as lr_scheduler: the groups have an "
            '"initial_lr", so there is a scheduler that was not given'
        )
    open_groups = [group for group in groups if not is_moe_param_group(group)]
    for index, group in enumerate(groups):
        group[_ORIGIN] = index
    has_name = [("name" in group) for group in groups]
    names = [group.get("name") for group in groups]
    for group in open_groups:
        group["name"] = f"group {group[_ORIGIN]}"
    split = split_params_into_different_moe_groups_for_optimizer(list(open_groups))
    marked = [group for group in groups if is_moe_param_group(group)]
    made = [group for group in (*split, *marked) if group["params"]]
    origins = [group.pop(_ORIGIN) for group in made]
    for group, origin in zip(made, origins, strict=True):
        if not is_moe_param_group(group):
            group.pop("name")
            group.update({"name": names[origin]} if has_name[origin] else {})
        group.pop("param_names", None)
    groups[:] = made
    _regroup(lr_scheduler, origins, len(names))
    return optimizer


def _regroup(scheduler: Any, origins: list[int], num_groups: int) -> None:
    """Give a scheduler one value per new group, that of the group it was split from."""
    if scheduler is None:
        return
    for inner in getattr(scheduler, "_schedulers", ()):
        _regroup(inner, origins, num_groups)
    for name in PER_GROUP + _DERIVED:
        values = getattr(scheduler, name, None)
        if isinstance(values, list | tuple) and len(values) == num_groups:
            setattr(scheduler, name, type(values)(values[origin] for origin in origins))


def splitting(make: Callable[..., Any]) -> Callable[[Any], Any]:
    """Wrap a function that makes an optimizer, so that experts have groups of their own."""

    @functools.wraps(make)
    def made(parameters: Any) -> torch.optim.Optimizer:
        return split_expert_groups(make(parameters))

    return made


def num_unmarked(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of expert parameters in groups that are not marked "moe"."""
    groups = [g for g in optimizer.param_groups if not is_moe_param_group(g)]
    return sum(is_moe_param(param) for group in groups for param in group["params"])


def check_groups(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a user's optimizer that ZeRO would partition over the wrong ranks.

    Raises:
        ValueError: with ZeRO 1 or 2, experts are in groups that are not marked; names the remedy.
    """
    count = num_unmarked(optimizer) if engine.zero_optimization_stage() in (1, 2) else 0
    if count:
        raise ValueError(
            "with ZeRO 1 and 2 an optimizer must have the experts in groups of their own, marked "
            f'"moe", got {count} expert parameters in others: call comet_ds.initialize instead of '
            "deepspeed.initialize, or comet_ds.split_expert_groups(optimizer) right after it is "
            "made (with a Trainer, in its create_optimizer), or configure the optimizer in the JSON"
        )


def name_groups(parameters: list[Any]) -> None:
    """Give a name to each group that has none: DeepSpeed splits groups by name."""
    for index, group in enumerate(parameters):
        if isinstance(group, dict):
            group.setdefault("name", f"group {index}")
