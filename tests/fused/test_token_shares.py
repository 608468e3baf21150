# SPDX-License-Identifier: Apache-2.0
"""On the fused path, ranks of a tensor parallel group share tokens that all of them hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups
from experts_zoo import GatedMLP
from parity import build, run
from tolerance import ERROR_RATIO, assert_close, relative_error

from comet_ds import MoE
from comet_ds.tensor_parallel import count_slots

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


class Pair:
    """Two ranks that are one tensor parallel group and one expert parallel group."""

    def __init__(self, rank: int) -> None:
        self.rank, self.tp_group = rank, dist.new_group([0, 1])
        self.dp_group = [dist.new_group([r]) for r in range(2)][rank]

    def get_tensor_model_parallel_rank(self) -> int:
        return self.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tp_group

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_group(self) -> Any:
        return self.dp_group


def check_shares(rank: int, size: int, drop: bool, k: int, num_tokens: int) -> None:
    """As close to fp32 as DeepSpeed's layer in bf16, and the fused path runs."""
    groups.mpu = Pair(rank)
    options = {
        "expert": GatedMLP(HIDDEN, FFN),
        "num_experts": 8,
        "ep_size": 2,
        "k": k,
        "drop_tokens": drop,
        "capacity_factor": 0.6,
        "top2_2nd_expert_sampling": False,
        "use_rts": False,
        "parallel": True,
        "device": "cuda",
    }
    torch.manual_seed(3)  # both ranks hold the same tokens
    x, grad = torch.randn(2, num_tokens, HIDDEN, device="cuda").bfloat16()
    truth = run(build(DeepSpeedMoE, rank, **options), x.float(), grad.float())
    theirs = run(build(DeepSpeedMoE, rank, dtype=torch.bfloat16, **options), x, grad)
    block = {"path": "fused", "exact_gate": True}
    layer = build(MoE, rank, dtype=torch.bfloat16, comet_ds=block, **options)
    ours = run(layer, x, grad)
    assert layer.deepspeed_moe.path == "fused"
    for what, value in truth.items():
        error, limit = (relative_error(found[what], value) for found in (ours, theirs))
        assert error <= ERROR_RATIO * limit + 1e-6, f"{what}: {error} > 1.5 * {limit}"
    assert_close(ours["l_aux"], theirs["l_aux"], "l_aux")


@pytest.mark.gpu(2)
@pytest.mark.parametrize("num_tokens", [256, 129])
@pytest.mark.parametrize(("drop", "k"), [(True, 1), (True, 2), (True, 4), (False, 2)])
def test_shares_give_deepspeeds_results(world, drop: bool, k: int, num_tokens: int) -> None:
    if num_tokens % 2 and k == 1:
        pytest.skip("DeepSpeed's layer needs tokens that the ranks can share evenly")
    world(2, "nccl").run(check_shares, drop, k, num_tokens)
