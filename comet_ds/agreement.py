# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other before they exchange rows: configuration once, counts every forward.

A rank that cannot go on says so in the message its peers wait for anyway, so every rank raises the
same error and none is left in a collective.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.constants import default_pg_timeout
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def agree_on_setup(
    facts: Mapping[str, Any], ranks: range, *, timeout: timedelta = default_pg_timeout
) -> None:
    """Check that a range of ranks builds the same layer.

    Goes through the process group's key-value store, not through a collective: ranks that disagree
    would not issue the same collectives.

    Args:
        facts: JSON values that must be equal on all ranks, by name.
        ranks: global ranks taking part, this one included. The n-th call of each is compared
            with the n-th call of the others.
        timeout: how long to wait for the others.

    Raises:
        ValueError: on every rank, naming the first fact that differs and both values, or the rank
            that did not come.
    """
    rank, first = dist.get_rank(), ranks.start
    store = torch.distributed.distributed_c10d._get_default_store()
    ordinal = store.add(f"comet_ds/calls/{rank}", 1)
    key = f"comet_ds/setup/{ranks.start}-{ranks.stop}/{ordinal}"
    store.set(f"{key}/{rank}", json.dumps(dict(facts)))
    if rank == first:
        store.set(f"{key}/verdict", _compare(store, key, facts, ranks, timeout))
    else:
        try:
            store.wait([f"{key}/verdict"], 2 * timeout)
        except torch.distributed.DistError as error:
            raise ValueError(f"rank {first} did not set up its MoE layer {ordinal}") from error
    verdict = store.get(f"{key}/verdict").decode()
    if verdict:
        raise ValueError(f"MoE layer {ordinal}: {verdict}")


def _compare(
    store: Any, key: str, facts: Mapping[str, Any], ranks: range, timeout: timedelta
) -> str:
    """Return what is wrong, or an empty string."""
    mine = json.loads(json.dumps(dict(facts)))
    for rank in ranks:
        try:
            store.wait([f"{key}/{rank}"], timeout)
        except torch.distributed.DistError:
            return f"rank {rank} has no such layer, or did not set it up within {timeout}"
        theirs = json.loads(store.get(f"{key}/{rank}"))
        for name, value in mine.items():
            if theirs.get(name) != value:
                return (
                    f"{name} must be the same on all ranks, got {value} on rank {ranks.start} "
                    f"and {theirs.get(name)} on rank {rank}"
                )
    return ""


@dataclass(frozen=True)
class InputFault:
    """What is wrong with a rank's input, in a form that fits in two integers.

    Attributes:
        code: one of the constants.
        value: what was given: a size, or an index into ``DTYPES`` (-1 = another dtype).
    """

    code: int
    value: int

    HIDDEN = 1
    DTYPE = 2
    DEVICE = 3
    USED_TOKEN = 4

    def message(self, layer: Mapping[str, Any]) -> str:
        """Return rule and value. ``layer`` holds hidden, dtype and device of the layer."""
        if self.code == self.HIDDEN:
            return f"hidden_states must end in hidden size {layer['hidden']}, got {self.value}"
        if self.code == self.DTYPE:
            got = DTYPES[self.value] if self.value >= 0 else "another dtype"
            return f"hidden_states must have the experts' dtype {layer['dtype']}, got {got}"
        if self.code == self.USED_TOKEN:
            return f"used_token must have one entry per token, got {self.value}"
        return f"hidden_states must be on the layer's device {layer['device']}, got another one"


class CountExchange:
    """Every rank's row counts on every rank; under way from construction until ``wait``.

    Args:
        counts: [n] int64 on the layer's device; this rank's.
        fault: what is wrong with this rank's input, if anything.
        layer: see ``InputFault.message``.
        group: expert parallel group, whose ranks all construct one.
    """

    def __init__(
        self, counts: Tensor, fault: InputFault | None, layer: Mapping[str, Any], group: Any
    ) -> None:
        self.group, self.layer = group, layer
        self.rank, self.ep_size = dist.get_rank(group=group), dist.get_world_size(group=group)
        message = F.pad(counts, (2, 0))
        if fault is not None:
            message[0].fill_(fault.code)
            message[1].fill_(fault.value)
        self._gathered = message.new_empty(self.ep_size * message.numel())
        dist.all_gather_into_tensor(self._gathered, message, group=group)
        self._host = self._gathered.to("cpu", non_blocking=True)
        self._arrived = None
        if counts.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> tuple[np.ndarray, Tensor]:
        """Wait on the host for the counts of all ranks.

        Returns:
            [W, n] int64 on the host, and the same on the device.

        Raises:
            ValueError: on every rank, if any rank's input has a fault.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        host = self._host.view(self.ep_size, -1).numpy()
        for rank, (code, value) in enumerate(host[:, :2].tolist()):
            if code:
                where = f"rank {rank} of the expert parallel group"
                raise ValueError(f"{where}: {InputFault(code, value).message(self.layer)}")
        return host[:, 2:], self._gathered.view(self.ep_size, -1)[:, 2:]
