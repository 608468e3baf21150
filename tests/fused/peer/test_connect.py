# SPDX-License-Identifier: Apache-2.0
"""Which expert parallel groups can share memory; those that cannot are told why."""

from __future__ import annotations

import pytest

from comet_ds.fused.peer.connect import _why_not_connected

FACTS = {"rank": 0, "host": ("a", "1"), "device": "x", "model": "H200, 132 SMs"}
FACTS |= {"out of reach": ["z"], "reason": None}
# What rank 1 has other than rank 0, and what is said.
OTHERS: dict[str, tuple[dict, str | None]] = {
    "a GPU each": ({"rank": 1, "device": "y"}, None),
    "one GPU for both": ({"rank": 1}, "must have a GPU each"),
    "a GPU out of reach": (
        {"rank": 1, "device": "z"},
        "GPU of rank 0 cannot address the memory of rank 1's",
    ),
    "two hosts": (
        {"rank": 1, "device": "y", "host": ("b", "2")},
        "rank 0 has ('a', '1'), rank 1 ('b', '2')",
    ),
    "two models": (
        {"rank": 1, "device": "y", "model": "H100, 114 SMs"},
        "rank 0 has H200, 132 SMs, rank 1 H100, 114 SMs",
    ),
    "no kernels": (
        {"rank": 1, "device": "y", "reason": "it has no kernels: no nvcc"},
        "rank 1: it has no kernels: no nvcc",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_why_not_connected(name: str) -> None:
    other, reason = OTHERS[name]
    found = _why_not_connected([FACTS, FACTS | other], max_ranks=32)
    assert found is None if reason is None else reason in found


def test_more_ranks_than_the_kernels_take() -> None:
    assert "at most 1 ranks" in _why_not_connected([FACTS, FACTS | {"device": "y"}], max_ranks=1)
