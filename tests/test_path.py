# SPDX-License-Identifier: Apache-2.0
"""Whether a layer may take the fused path on its group: what is asked for, and why it cannot."""

from __future__ import annotations

import contextlib

import pytest
import torch

from comet_ds import path
from comet_ds.config import CometConfig
from comet_ds.fused.refusal import Refusal
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.path import PathChoice

CANNOT = Refusal("its ranks must share a host")
# Pin, ep_size, whether the gate drops tokens, device, and the reason; None for no question.
CHOICES: dict[str, tuple[str, int, bool, str, str | None]] = {
    "auto, a group that cannot": ("auto", 4, True, "cuda", CANNOT.reason),
    "auto, no dropping": ("auto", 4, False, "cuda", CANNOT.reason),
    "auto, on a CPU": ("auto", 4, True, "cpu", "it needs a CUDA device, not cpu"),
    "one rank, no exchange": ("auto", 1, False, "cuda", None),
    "pinned to the pipelined path": ("pipelined", 4, True, "cuda", None),
    "pinned to the reference": ("reference", 4, True, "cuda", None),
}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a group with GPUs be one that cannot share its memory."""
    monkeypatch.setattr(path, "connect", lambda *_: CANNOT)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


def choice(pin: str, ep_size: int, drops: bool) -> PathChoice:
    gate = TopKGate(16, 2 * ep_size, 2, drop_tokens=drops)
    return PathChoice(CometConfig(path=pin), ep_size, 2, gate)


@pytest.mark.parametrize("name", CHOICES)
def test_group_is_asked_where_the_path_is_open(name: str) -> None:
    """Where tokens are dropped or not makes no difference."""
    *options, device, reason = CHOICES[name]
    found = choice(*options).connect(None, torch.device(device))
    assert found is None if reason is None else found.reason == reason


def test_a_pin_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=f'"fused" is pinned and cannot run: {CANNOT.reason}'):
        choice("fused", 4, False).connect(None, torch.device("cuda"))
