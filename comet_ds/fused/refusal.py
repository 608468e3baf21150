# SPDX-License-Identifier: Apache-2.0
"""Why a layer cannot take the fused path."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """What stands in the place of an object that the fused path needs.

    Attributes:
        reason: a clause for the log line, such as "it needs bfloat16 or float16, not float32".
    """

    reason: str
