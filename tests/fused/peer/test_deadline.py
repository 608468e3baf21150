# SPDX-License-Identifier: Apache-2.0
"""A kernel does not wait for another rank for ever: its deadline fires and names the rank."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Rank 1 of three on one GPU never comes to the forward that ranks 0 and 2 have launched.
ABSENT = """
import sys, torch
sys.path.insert(0, "tests")
from helpers.experts_zoo import GatedMLP
from helpers.virtual_ranks import VirtualGroup
group = VirtualGroup(3, timeout_s=2, expert=GatedMLP(64, 96), num_experts=6, dtype=torch.bfloat16)
xs = [torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)] * 3
group.load(xs, xs)
group.forward(xs, ranks=[0, 2])
torch.cuda.synchronize()
"""


@pytest.mark.gpu(1)
def test_deadline_in_a_kernel_fires_and_names_the_absent_rank() -> None:
    """In a process of its own, since the GPU's context does not survive it."""
    command = [sys.executable, "-c", ABSENT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    said = done.stdout + done.stderr
    assert done.returncode != 0, said
    # The first that gives up ends the others, which share its GPU here.
    assert "of the expert parallel group waited 2 s for rank 1" in said
    assert 'its flag for "tokens" is 0, not 1' in said
