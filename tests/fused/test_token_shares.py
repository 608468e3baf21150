# SPDX-License-Identifier: Apache-2.0
"""On the fused path, ranks of a tensor parallel group share tokens that all of them hold."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups
from helpers.experts_zoo import GatedMLP
from helpers.mpu import PairsMpu
from helpers.parity import build, run
from helpers.tolerance import assert_close

from comet_ds import MoE
from comet_ds.gate.routing import count_slots

HIDDEN, FFN = 128, 192


@pytest.mark.parametrize("num_tokens", [0, 1, 50])
def test_slots_count_an_experts_routes_by_token(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.rand(num_tokens, 5, generator=generator).argsort(dim=1)[:, :3]
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    slots, counts = count_slots(ids, 5)
    assert slots.dtype == counts.dtype == torch.int32
    for expert in range(5):
        assert slots[ids == expert].tolist() == list(range(counts[expert]))
    assert (slots[ids < 0] == -1).all()


def check_shares(rank: int, size: int, drop: bool, k: int, num_tokens: int) -> None:
    """The fused path runs, and gives what DeepSpeed's layer gives, to bf16's rounding."""
    groups.mpu = PairsMpu(rank, size)
    options = {
        "expert": GatedMLP(HIDDEN, FFN),
        "num_experts": 8,
        "ep_size": 2,
        "k": k,
        "drop_tokens": drop,
        "capacity_factor": 0.5,
        "top2_2nd_expert_sampling": False,
        "use_rts": False,
        "parallel": True,
        "device": "cuda",
    }
    torch.manual_seed(3)  # both ranks hold the same tokens
    x, grad = torch.randn(2, num_tokens, HIDDEN, device="cuda").bfloat16()
    theirs = run(build(DeepSpeedMoE, rank, dtype=torch.bfloat16, **options), x, grad)
    block = {"path": "fused", "exact_gate": True}
    layer = build(MoE, rank, dtype=torch.bfloat16, comet_ds=block, **options)
    ours = run(layer, x, grad)
    assert layer.deepspeed_moe.path == "fused"
    for what, value in theirs.items():
        assert_close(ours[what], value, what)


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    ("drop", "k", "num_tokens"),
    [
        pytest.param(True, 1, 256, id="top-1, capacity 16"),
        pytest.param(True, 2, 256, id="top-2, capacity 32"),
        pytest.param(True, 4, 256, id="top-4, capacity 64"),
        pytest.param(False, 2, 256, id="nothing dropped"),
        pytest.param(False, 2, 129, id="a token more for the first rank"),
    ],
)
def test_shares_give_deepspeeds_results(world, drop: bool, k: int, num_tokens: int) -> None:
    world(2, "nccl").run(check_shares, drop, k, num_tokens)
