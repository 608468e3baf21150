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
    """Check that a range of ranks is set up alike.

    Goes through the process group's key-value store, not through a collective: ranks that disagree
    would not issue the same collectives.

    Args:
        facts: JSON values that must be equal on all ranks, by name.
        ranks: global ranks taking part, this one included. The n-th call of each for this range
            is compared with the n-th call of the others.
        timeout: how long to wait for the others.

    Raises:
        ValueError: on every rank, naming the first fact that differs and both values, or the rank
            that did not come.
    """
    rank, first = dist.get_rank(), ranks.start
    store = torch.distributed.distributed_c10d._get_default_store()
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
    """Return what is wrong, or an empty string."""
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


@dataclass(frozen=True)
class InputRules:
    """What a layer's input must be.

    A broken rule is a fault: its code and what was given, two integers that fit in the message
    every rank waits for anyway.

    Attributes:
        hidden: size of the last dimension.
        dtype: the experts' dtype; None where any will do (mixed parameters, autocast).
        device: the layer's.
        takes_used_token: whether ``used_token`` is looked at.
    """

    hidden: int
    dtype: torch.dtype | None
    device: torch.device
    takes_used_token: bool

    OK, HIDDEN, DTYPE, DEVICE, USED_TOKEN = range(5)

    def check(self, x: Tensor, used_token: Tensor | None) -> tuple[int, int]:
        """Return code and value of the first rule broken, ``(OK, 0)`` if none is."""
        if x.shape[-1:] != (self.hidden,):
            return self.HIDDEN, x.shape[-1] if x.dim() else 0
        if x.device != self.device:
            return self.DEVICE, 0
        if self.dtype is not None and x.dtype != self.dtype:
            return self.DTYPE, DTYPES.index(x.dtype) if x.dtype in DTYPES else -1
        if self.takes_used_token and used_token is not None:
            fits = used_token.numel() * self.hidden == x.numel()
            if not fits or used_token.device != self.device:
                return self.USED_TOKEN, used_token.numel()
        return self.OK, 0

    def message(self, code: int, value: int) -> str:
        """Return the rule and what was given."""
        if code == self.HIDDEN:
            return f"hidden_states must end in hidden size {self.hidden}, got {value}"
        if code == self.DTYPE:
            got = DTYPES[value] if value >= 0 else "another dtype"
            return f"hidden_states must have the experts' dtype {self.dtype}, got {got}"
        if code == self.DEVICE:
            return f"hidden_states must be on the layer's device {self.device}, got another one"
        return (
            f"used_token must have one entry per token, on the layer's device {self.device}, "
            f"got {value} entries"
        )


class CountExchange:
    """Every rank's row counts on every rank; under way from construction until ``wait``.

    Args:
        counts: [n] int64 on the layer's device; this rank's.
        group: expert parallel group, whose ranks all construct one.
        rules: what ``fault`` is about.
        fault: code and value of the rule this rank's input breaks, if any.
    """

    def __init__(
        self, counts: Tensor, group: Any, rules: InputRules, *, fault: tuple[int, int] | None = None
    ) -> None:
        self.group, self.rules = group, rules
        self.rank, self.ep_size = dist.get_rank(group=group), dist.get_world_size(group=group)
        message = F.pad(counts, (2, 0))
        if fault is not None:
            message[0].fill_(fault[0])
            message[1].fill_(fault[1])
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
            if code != self.rules.OK:
                where = f"rank {rank} of the expert parallel group"
                raise ValueError(f"{where}: {self.rules.message(code, value)}")
        return host[:, 2:], self._gathered.view(self.ep_size, -1)[:, 2:]
