# SPDX-License-Identifier: Apache-2.0
"""Rules for a layer's input, and the messages of broken rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class InputRules:
    """The rules for the input of one layer.

    A broken rule is a fault, which two integers describe: the rule's code and the given value. They
    fit in the message that all ranks exchange before the dispatch.

    Attributes:
        hidden: required size of the last dimension.
        dtype: required dtype, the experts'; None if the experts accept several (mixed parameters,
            autocast, a module that converts its input). It must be the same on all ranks.
        device: required device, the layer's.
        takes_used_token: whether the gate reads ``used_token``.
    """

    hidden: int
    dtype: torch.dtype | None
    device: torch.device
    takes_used_token: bool

    OK, HIDDEN, DTYPE, DEVICE, USED_TOKEN = range(5)

    @property
    def facts(self) -> tuple[int, torch.dtype | None, torch.device, bool]:
        """The attributes, in their order."""
        return self.hidden, self.dtype, self.device, self.takes_used_token

    def check(self, x: Tensor, used_token: Tensor | None) -> tuple[int, int]:
        """Return code and value of the first broken rule, ``(OK, 0)`` for a valid input.

        Args:
            x: [..., H]; the layer's input.
            used_token: one entry per token, or None.
        """
        if x.shape[-1:] != (self.hidden,):
            return self.HIDDEN, x.shape[-1] if x.dim() else 0
        if x.device != self.device:
            return self.DEVICE, 0
        if x.dtype not in DTYPES or (self.dtype is not None and x.dtype != self.dtype):
            return self.DTYPE, DTYPES.index(x.dtype) if x.dtype in DTYPES else -1
        if self.takes_used_token and used_token is not None:
            fits = used_token.numel() * self.hidden == x.numel()
            if not fits or used_token.device != self.device:
                return self.USED_TOKEN, used_token.numel()
        return self.OK, 0

    def raise_first(self, faults: Sequence[Sequence[int]]) -> None:
        """Raise ValueError for the first fault.

        Args:
            faults: code and value of each rank of the expert parallel group.
        """
        for rank, (code, value) in enumerate(faults):
            if code != self.OK:
                where = f"rank {rank} of the expert parallel group"
                raise ValueError(f"{where}: {self.message(code, value)}")

    def raise_if_dtypes_differ(self, codes: Sequence[int]) -> None:
        """Raise ValueError if the dtype of the input differs between ranks.

        Args:
            codes: ``dtype_code`` of each rank of the expert parallel group.
        """
        for rank, code in enumerate(codes):
            if code != codes[0]:
                first, other = (DTYPES[c - 1] for c in (codes[0], code))
                raise ValueError(
                    "hidden_states must have the same dtype on all ranks of the expert parallel "
                    f"group, got {first} on rank 0 and {other} on rank {rank}"
                )

    def message(self, code: int, value: int) -> str:
        """Return a sentence with the rule and the given value."""
        if code == self.HIDDEN:
            return f"hidden_states must end in hidden size {self.hidden}, got {value}"
        if code == self.DTYPE:
            got = DTYPES[value] if value >= 0 else "another dtype"
            if self.dtype is None:
                return f"hidden_states must be floating point, got {got}"
            return f"hidden_states must have the experts' dtype {self.dtype}, got {got}"
        if code == self.DEVICE:
            return f"hidden_states must be on the layer's device {self.device}, got another one"
        return (
            f"used_token must have one entry per token, on the layer's device {self.device}, "
            f"got {value} entries"
        )


def dtype_code(dtype: torch.dtype) -> int:
    """Return the code of an input's dtype in a message; never 0."""
    return 1 + DTYPES.index(dtype)
