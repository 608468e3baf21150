# SPDX-License-Identifier: Apache-2.0
"""Exchange of row counts before the dispatch, together with each rank's faults and needs."""

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
    """Gathers the row counts of all ranks; the constructor starts it, ``wait`` finishes it.

    Collective: all ranks of the group construct one in the same forward.

    Args:
        counts: [n] int64 on the layer's device; this rank's counts.
        group: expert parallel group.
        rules: the input rules that ``fault`` refers to.
        attendance: the layer's waits on this group.
        dtype: dtype of this rank's input; None with a fault.
        needs: gradients this rank needs, from ``find_needs``.
        fault: code and value of the rule that this rank's input breaks; None for a valid input.

    Attributes:
        needs: gradients that at least one rank needs; None until ``wait`` has returned.
        attendance: as given.
        what: name of the forward in messages, "its forward number 3".
    """

    # Layout of a message, int64: word 0 is the fault's code in its low CODE_BITS, then the needs,
    # then the dtype's code; word 1 is the fault's value; the counts follow. Without a fault nobody
    # reads word 1, so one padding operation fills both words.
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
        self._agreed: BackwardNeeds | None = None
        self.attendance, self.what = attendance, f"its forward number {attendance.begin()}"
        flags = needs if dtype is None else needs | dtype_code(dtype) << NUM_NEED_BITS
        message = F.pad(counts, (2, 0), value=flags << self.CODE_BITS)
        if fault is not None:
            message[0].fill_(fault[0])
            message[1].fill_(fault[1])
        self._gathered = message.new_empty(self.ep_size * message.numel())
        self._message = message  # must stay alive until it has been sent
        work = dist.all_gather_into_tensor(self._gathered, message, group=group, async_op=True)
        assert work is not None, "it is asynchronous"
        self._work = work
        self._host, self._copied = self._gathered, None
        if counts.is_cuda:
            work.wait()
            self._host = self._gathered.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def needs(self) -> BackwardNeeds:
        """The gradients that some rank needs; known when ``wait`` has returned."""
        assert self._agreed is not None, "wait() comes first"
        return self._agreed

    def wait(self) -> tuple[np.ndarray, Tensor]:
        """Wait on the host for the counts of all ranks.

        Returns:
            [W, n] int64 on the host, and the same on the device.

        Raises:
            ValueError: on every rank, if any rank's input has a fault or the dtypes differ.
            RuntimeError: a rank did not join in time.
        """
        if self._copied is not None:
            self.attendance.finish_event(self._copied, self.what)
        else:
            self.attendance.finish(self._work, self._gathered, self.what)
        host = self._host.view(self.ep_size, -1).numpy()
        words = host[:, :2].tolist()
        mask = (1 << self.CODE_BITS) - 1
        self.rules.raise_first([(word & mask, value) for word, value in words])
        flags = [word >> self.CODE_BITS for word, _ in words]
        self.rules.raise_if_dtypes_differ([f >> NUM_NEED_BITS for f in flags])
        self._agreed = BackwardNeeds.agree(flags)
        return host[:, 2:], self._gathered.view(self.ep_size, -1)[:, 2:]
