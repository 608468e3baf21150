# SPDX-License-Identifier: Apache-2.0
"""Checks that ranks have the same set-up, through the key-value store, and a maximum over ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from deepspeed import comm as dist
from deepspeed.constants import default_pg_timeout

from comet_ds._compat.torch import default_store


def agree_on_setup(
    facts: Mapping[str, Any], ranks: range, *, timeout: timedelta = default_pg_timeout
) -> None:
    """Check that a range of ranks has the same set-up. Waits for all of them.

    Uses the process group's key-value store and no collective, because ranks that disagree would
    not issue the same collectives.

    Args:
        facts: JSON values by name; they must be equal on all ranks.
        ranks: global ranks taking part, this one included. The n-th call of a rank for this range
            is compared with the n-th call of the others.
        timeout: how long to wait for another rank.

    Raises:
        ValueError: on every rank, naming the first fact that differs and both values, or the rank
            that did not call in time.
    """
    rank, first = dist.get_rank(), ranks.start
    store = default_store()
    span = f"comet_ds/{ranks.start}-{ranks.stop}"
    ordinal = store.add(f"{span}/calls/{rank}", 1)
    key = f"{span}/{ordinal}"
    store.set(f"{key}/{rank}", json.dumps(dict(facts)))
    if rank == first:
        store.set(f"{key}/verdict", _compare(store, key, facts, ranks, timeout))
    else:
        try:
            store.wait([f"{key}/verdict"], 2 * timeout)
        except torch.distributed.DistError as error:
            raise ValueError(f"rank {first} did not reach set-up {ordinal}") from error
    verdict = store.get(f"{key}/verdict").decode()
    if verdict:
        raise ValueError(f"set-up {ordinal}: {verdict}")


def _compare(
    store: Any, key: str, facts: Mapping[str, Any], ranks: range, timeout: timedelta
) -> str:
    """Return a sentence that names the first difference, or an empty string."""
    mine = json.loads(json.dumps(dict(facts)))
    for rank in ranks:
        try:
            store.wait([f"{key}/{rank}"], timeout)
        except torch.distributed.DistError:
            return f"rank {rank} did not take part within {timeout}"
        theirs = json.loads(store.get(f"{key}/{rank}"))
        for name, value in mine.items():
            if theirs.get(name) != value:
                return (
                    f"{name} must be the same on all ranks, got {value} on rank {ranks.start} "
                    f"and {theirs.get(name)} on rank {rank}"
                )
    return ""


def agree_on_largest(value: int, group: Any, device: torch.device) -> int:
    """Return the maximum over a group. Collective; the host waits for the device.

    Args:
        value: this rank's value.
        group: process group.
        device: where the collective runs.
    """
    message = torch.tensor([value], device=device)
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    return int(message)
