# SPDX-License-Identifier: Apache-2.0
"""The exchange of row counts before rows travel, with each rank's faults and needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor

from comet_ds.ranks.gradients import NUM_NEED_BITS, BackwardNeeds
from comet_ds.ranks.waiting import Attendance
from comet_ds.validation import InputRules, dtype_code


class CountExchange:
    """Every rank's row counts on every rank; under way from construction until ``wait``.

    Args:
        counts: [n] int64 on the layer's device; this rank's.
        group: expert parallel group, whose ranks all construct one.
        rules: what ``fault`` is about.
        attendance: of the group, for the layer.
        dtype: of this rank's input, without a fault.
        needs: gradients this rank needs, from ``find_needs``.
        fault: code and value of the rule this rank's input breaks, if any.

    Attributes:
        needs: gradients that any rank needs, once ``wait`` has returned.
        attendance: as given.
        what: the forward's name in messages.
    """

    # The first word is a fault's code and, above it, what is needed and the dtype; the second a
    # fault's value, and means nothing where there is none: so padding fills in both.
    CODE_BITS = 8

    def __init__(
        self,
        counts: Tensor,
        group: Any,
        rules: InputRules,
        attendance: Attendance,
        *,
        dtype: torch.dtype | None = None,
        needs: int = 0,
        fault: tuple[int, int] | None = None,
    ) -> None:
        self.group, self.rules = group, rules
        self.rank, self.ep_size = dist.get_rank(group=group), dist.get_world_size(group=group)
        self.needs: BackwardNeeds | None = None
        self.attendance, self.what = attendance, f"forward number {attendance.begin()}"
        said = needs if dtype is None else needs | dtype_code(dtype) << NUM_NEED_BITS
        message = F.pad(counts, (2, 0), value=said << self.CODE_BITS)
        if fault is not None:
            message[0].fill_(fault[0])
            message[1].fill_(fault[1])
        self._gathered = message.new_empty(self.ep_size * message.numel())
        self._message = message  # as long as it is being sent
        self._work = dist.all_gather_into_tensor(
            self._gathered, message, group=group, async_op=True
        )
        self._host, self._arrived = self._gathered, None
        if counts.is_cuda:
            self._work.wait()
            self._host = self._gathered.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> tuple[np.ndarray, Tensor]:
        """Wait on the host for the counts of all ranks.

        Returns:
            [W, n] int64 on the host, and the same on the device.

        Raises:
            ValueError: on every rank, if any rank's input has a fault.
            RuntimeError: a rank did not come in time.
        """
        if self._arrived is not None:
            self.attendance.finish_event(self._arrived, self.what)
        else:
            self.attendance.finish(self._work, self._gathered, self.what)
        host = self._host.view(self.ep_size, -1).numpy()
        words = host[:, :2].tolist()
        mask = (1 << self.CODE_BITS) - 1
        self.rules.raise_first([(word & mask, value) for word, value in words])
        said = [word >> self.CODE_BITS for word, _ in words]
        self.rules.raise_if_they_differ([s >> NUM_NEED_BITS for s in said])
        self.needs = BackwardNeeds.agree(said)
        return host[:, 2:], self._gathered.view(self.ep_size, -1)[:, 2:]
