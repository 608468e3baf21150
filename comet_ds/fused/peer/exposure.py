# SPDX-License-Identifier: Apache-2.0
"""Communication that computation does not hide, as the kernels measure it."""

from __future__ import annotations

import torch


class ExposureMeter:
    """Measures how much time a layer's communication takes from its computation.

    The kernels count the time of CTAs that communicate during a GEMM instead of computing, and the
    time in barriers between ranks. They do not count tiles that wait for rows, copies before and
    after the GEMMs, the sum of the results, or what frozen experts push outside any GEMM.

    Args:
        device: the rank's GPU.
    """

    DIRECTIONS = ("forward", "backward")

    def __init__(self, device: torch.device) -> None:
        self._exposures = torch.zeros(2, 2, dtype=torch.int64, device=device)  # csrc's Exposure
        self._num_calls = [0, 0]

    def begin(self, direction: int) -> int:
        """Count a call, 0 forward or 1 backward; return the address of its ``Exposure``.

        0 while a CUDA graph is captured, which would add to the memory long after the meter's end.
        """
        if self._exposures.is_cuda and torch.cuda.is_current_stream_capturing():
            return 0
        self._num_calls[direction] += 1
        return self._exposures[direction].data_ptr()

    def read(self, num_sms: int) -> dict[str, float]:
        """Return the mean ms of a call by direction, of those that had any; waits."""
        parts = zip(self.DIRECTIONS, self._exposures.tolist(), self._num_calls, strict=True)
        return {
            name: (communicating / num_sms + barrier) / calls / 1e6
            for name, (communicating, barrier), calls in parts
            if calls
        }
