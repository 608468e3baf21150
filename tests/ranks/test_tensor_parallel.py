# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism outside and inside the experts gives DeepSpeed's results."""

from __future__ import annotations

import pytest
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups
from helpers.mpu import PairsMpu
from helpers.parity import HIDDEN, build, run, tokens
from helpers.tolerance import assert_close

from comet_ds import MoE


def check_tensor_parallel(rank: int, size: int, expert_tp: bool, drop: bool, k: int) -> None:
    """Ranks of a TP pair hold the same tokens.

    With whole experts DeepSpeed spreads an expert's slots over the pair and we spread the tokens:
    the expert gradients agree once they are summed over the ranks that hold the same expert.
    """
    groups.mpu = PairsMpu(rank, size)
    original = dist.all_gather_into_tensor
    # DeepSpeed's mappings pass gloo a flat output for an input that is not.
    dist.all_gather_into_tensor = lambda out, rows, **kwargs: original(
        out.view(-1), rows.reshape(-1), **kwargs
    )
    try:
        compare_tensor_parallel(rank, expert_tp, drop, k)
    finally:
        dist.all_gather_into_tensor = original


def compare_tensor_parallel(rank: int, expert_tp: bool, drop: bool, k: int) -> None:
    x, grad = tokens(rank // 2, (48, HIDDEN))
    options = dict(
        num_experts=4,
        ep_size=2,
        k=k,
        drop_tokens=drop,
        enable_expert_tensor_parallelism=expert_tp,
        parallel=True,
    )
    results = []
    for cls, extra in ((DeepSpeedMoE, {}), (MoE, {}), (MoE, {"comet_ds": {"path": "reference"}})):
        # With expert tensor parallelism the EP group is every second rank.
        ep_rank = rank // 2 if expert_tp else rank
        layer = build(cls, ep_rank, **options, **extra)
        result = run(layer, x, grad)
        for name, value in result.items():
            if "deepspeed_experts" in name:
                dist.all_reduce(value, group=groups._get_expert_data_parallel_group("ep_size_2"))
        results.append(result)
    for got in results[1:]:
        for name, value in results[0].items():
            assert_close(got[name], value, f"rank {rank}: {name}")


# Whether experts are tensor parallel, too, whether tokens are dropped, and k.
TENSOR_PARALLEL = {
    f"{what}, k={k}": (expert_tp, True, k)
    for expert_tp, what in ((False, "whole experts"), (True, "experts in parts"))
    for k in (1, 2, 4)
}
# Without dropping DeepSpeed's expert tensor parallelism needs capacities that happen to be even.
TENSOR_PARALLEL["whole experts, no dropping"] = (False, False, 2)


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_tensor_parallelism(world, name: str) -> None:
    world(4).run(check_tensor_parallel, *TENSOR_PARALLEL[name])
