# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism on 1, 2 and 4 ranks, on the reference and the pipelined path.

Parity with DeepSpeed for every option, errors against fp64, uneven numbers of tokens, the same bits
in every run, and that only kept routes travel, overlapped with the experts.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.experts_zoo import GatedMLP, TupleMLP, randomize, sequential
from helpers.parity import FFN, HIDDEN, VARIANTS, build, oracle, run, tokens
from helpers.tolerance import ERROR_RATIO, assert_close, relative_error
from torch import nn

from comet_ds import MoE
from comet_ds.observe.metrics import TokenCounter

# ---- parity ------------------------------------------------------------------------------------


def check_parity(rank: int, size: int, options: dict, num_tokens: int, dtype=torch.float32) -> None:
    """Compare every variant with DeepSpeed; expert gradients are the sum over all ranks' tokens."""
    x, grad = tokens(rank, (num_tokens, HIDDEN), dtype)
    ep_size = options.pop("ep_size", size)
    used = None
    if options.pop("used_token", False):
        used = (torch.rand(num_tokens) < 0.7).long()
    training = options.pop("training", True)
    common = dict(ep_size=ep_size, parallel=True, dtype=dtype, **options)
    expected = run(build(DeepSpeedMoE, rank, **common).train(training), x, grad, used)
    for variant, block in VARIANTS.items():
        got = run(build(MoE, rank, **common, comet_ds=block).train(training), x, grad, used)
        for name, value in expected.items():
            assert_close(got[name], value, f"rank {rank}, {variant}, {options}: {name}")


PARITY = [
    dict(k=k, drop_tokens=drop, noisy_gate_policy=noise, training=training)
    for k, drop, noise, training in itertools.product(
        (1, 2, 4, 8), (True, False), (None, "Jitter", "RSample"), (True, False)
    )
] + [
    dict(k=1, used_token=True),
    dict(k=1, use_rts=False),
    dict(k=2, top2_2nd_expert_sampling=False),
    dict(k=2, capacity_factor=0.4),
    dict(k=4, capacity_factor=0.4, use_residual=True),
]


def check_parity_table(rank: int, size: int, k: int) -> int:
    cases = [options for options in PARITY if options["k"] == k]
    for options in cases:
        check_parity(rank, size, dict(options), 48)
    return len(cases)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_parity_with_deepspeed(world, size: int, k: int) -> None:
    assert min(world(size).run(check_parity_table, k)) >= 12


OTHERS = {
    "one expert a rank": dict(num_experts=2, k=1),
    "one expert a rank, k=2": dict(num_experts=2, k=2),
    "uneven expert groups": dict(num_experts=10, k=4),
    "replicas": dict(ep_size=1, k=2),
    "gated experts": dict(expert=GatedMLP(HIDDEN, FFN), k=4),
    "tuple output": dict(expert=TupleMLP(HIDDEN, FFN), k=2),
    "bf16": dict(k=2, dtype=torch.bfloat16),
    "fp16": dict(k=4, dtype=torch.float16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_parity_of_other_layers(world, name: str) -> None:
    options = dict(OTHERS[name])
    dtype = options.pop("dtype", torch.float32)
    world(2).run(check_parity, options, 33, dtype)


def check_replicas(rank: int, size: int) -> None:
    """4 ranks, ep_size 2: two EP groups side by side, each with its own copy of the experts."""
    check_parity(rank, size, dict(ep_size=2, k=2), 40)
    layer = build(MoE, rank, ep_size=2, parallel=True)
    ranks = torch.distributed.get_process_group_ranks(layer.deepspeed_moe.ep_group)
    assert ranks == ([0, 1] if rank < 2 else [2, 3])


def test_groups_smaller_than_the_world(world) -> None:
    world(4).run(check_replicas)


# ---- numerics ----------------------------------------------------------------------------------


def check_oracle(rank: int, size: int, num_tokens: list[int], k: int, block: dict) -> None:
    """Compare with fp64 on gathered weights, relative to the same-dtype DeepSpeed layer."""
    x, grad = tokens(rank, (num_tokens[rank], HIDDEN), torch.bfloat16)
    options = dict(ep_size=size, k=k, drop_tokens=False, parallel=True, dtype=torch.bfloat16)
    layer = build(MoE, rank, **options, comet_ds=block)
    got = run(layer, x, grad)
    experts = [randomize(sequential(HIDDEN, FFN), i).bfloat16().double() for i in range(8)]
    truth = oracle(layer, x, grad, experts)
    assert abs(got["l_aux"].double() - truth["l_aux"]) < 1e-5
    mine = {"output": got["output"], "grad of x": got["grad of x"]}
    errors = {name: relative_error(value, truth[name]) for name, value in mine.items()}
    # Gradients of the experts: every rank's tokens contribute, so the truth is the sum over ranks.
    for tensor in truth["grads of experts"]:
        dist.all_reduce(tensor)
    own = [t for n, t in got.items() if "deepspeed_experts" in n]
    first = rank * len(own)
    for i, tensor in enumerate(own):
        expected = truth["grads of experts"][first + i]
        errors[f"expert parameter {first + i}"] = relative_error(tensor, expected)
    if len(set(num_tokens)) == 1:  # DeepSpeed needs equal numbers
        theirs = run(build(DeepSpeedMoE, rank, **options), x, grad)
        baseline = {name: relative_error(theirs[name], truth[name]) for name in mine}
        for name, limit in baseline.items():
            assert errors[name] <= ERROR_RATIO * limit, f"{name}: {errors[name]} > 1.5 * {limit}"
    worst = max(errors, key=errors.get)
    assert errors[worst] < 2e-2, f"rank {rank}: {worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_error_against_fp64(world, k: int, variant: str) -> None:
    world(2).run(check_oracle, [64, 64], k, VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "num_tokens",
    [[7, 63, 129, 1], [0, 5, 40, 0], [0, 0, 0, 3]],
    ids=["all differ", "two without", "three without"],
)
def test_uneven_tokens(world, num_tokens: list[int], variant: str) -> None:
    """DeepSpeed hangs on these."""
    world(4).run(check_oracle, num_tokens, 2, VARIANTS[variant])


def check_nobody_has_tokens(rank: int, size: int, block: dict) -> None:
    layer = build(MoE, rank, ep_size=size, k=2, parallel=True, comet_ds=block)
    empty = torch.empty(0, HIDDEN)
    result = run(layer, empty, empty)
    assert all(t.abs().sum() == 0 for n, t in result.items() if n.startswith("grad"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_nobody_has_tokens(world, variant: str) -> None:
    world(2).run(check_nobody_has_tokens, VARIANTS[variant])


def check_repeats(rank: int, size: int) -> None:
    """Bitwise equal from run to run, with the number of tokens changing in between."""
    layer = build(MoE, rank, ep_size=size, k=4, parallel=True, dtype=torch.bfloat16)
    results = []
    for num_tokens in (65, 3, 130, 65):
        x, grad = tokens(rank, (num_tokens, HIDDEN), torch.bfloat16)
        results.append(run(layer, x, grad))
    for name, value in results[0].items():
        assert torch.equal(results[-1][name], value), name


def test_repeats_bitwise(world) -> None:
    world(2).run(check_repeats)


def check_only_kept_routes_travel(rank: int, size: int) -> None:
    sent = []
    original = dist.all_to_all_single

    def spy(output, rows, receive, send, **kwargs):
        sent.append(rows.numel())
        return original(output, rows, receive, send, **kwargs)

    block = {"num_chunks": 2}
    layer = build(MoE, rank, ep_size=size, k=2, capacity_factor=0.5, parallel=True, comet_ds=block)
    x, grad = tokens(rank, (64, HIDDEN))
    dist.all_to_all_single = spy
    try:
        run(layer, x, grad)
    finally:
        dist.all_to_all_single = original
    kept = (layer.deepspeed_moe.routing.topk_ids >= 0).sum().item()
    assert 0 < kept < 128
    assert sum(sent[:2]) == kept * HIDDEN  # two chunks' dispatch: no capacity padding
    assert len(sent) == 8  # dispatch and combine, forward and backward, of two chunks


def test_only_kept_routes_travel(world) -> None:
    world(2).run(check_only_kept_routes_travel)


def check_overlap_order(rank: int, size: int) -> None:
    """Record starts, waits and expert runs: forward and backward interleave them."""
    import comet_ds.pipelined.forward as pipelined

    events = []

    class Recorded(pipelined.Transfer):
        def start(self, rows):
            events.append("start")
            super().start(rows)

        def wait(self):
            events.append("wait")
            return super().wait()

    class Expert(nn.Linear):
        def forward(self, x):
            events.append("expert")
            y = super().forward(x)
            y.register_hook(lambda _: events.append("expert"))
            return y

    original, pipelined.Transfer = pipelined.Transfer, Recorded
    try:
        layer = build(
            MoE,
            rank,
            expert=Expert(HIDDEN, HIDDEN),
            num_experts=4,
            ep_size=size,
            parallel=True,
            comet_ds={"num_chunks": 2},
        )
        run(layer, *tokens(rank, (32, HIDDEN)))
    finally:
        pipelined.Transfer = original
    one_way = "start start wait expert start wait expert start wait wait"
    assert " ".join(events) == f"{one_way} {one_way}"


def test_chunks_overlap_forward_and_backward(world) -> None:
    world(2).run(check_overlap_order)


def check_checkpointing(rank: int, size: int, reentrant: bool) -> None:
    layer = build(MoE, rank, ep_size=size, k=2, parallel=True)
    x, grad = tokens(rank, (32, HIDDEN))
    expected = run(layer, x, grad)
    counter = TokenCounter(layer)

    class Checkpointed(nn.Module):
        training = True

        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x, used_token):
            return torch.utils.checkpoint.checkpoint(layer, x, used_token, use_reentrant=reentrant)

        @property
        def deepspeed_moe(self):
            return layer.deepspeed_moe

        def named_parameters(self, *args, **kwargs):
            return layer.named_parameters(*args, **kwargs)

    got = run(Checkpointed(), x, grad)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
    # The recomputed forward is not counted again.
    assert counter.num_tokens == 32


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(world, reentrant: bool) -> None:
    world(2).run(check_checkpointing, reentrant)
