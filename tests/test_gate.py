# SPDX-License-Identifier: Apache-2.0
"""The gate decides what the installed DeepSpeed decides, from the same draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from deepspeed.moe import sharded_moe

from comet_ds.gate import Routing, TopKGate

HIDDEN, NUM_EXPERTS = 24, 8

# Every option that reaches the gate; options a k ignores are in, to see that they stay ignored.
OPTIONS = list(
    itertools.product(
        (1, 2, 4, 8),  # k
        (True, False),  # drop_tokens
        (None, "Jitter", "RSample"),
        (True, False),  # use_rts
        (True, False),  # top2_2nd_expert_sampling
        (True, False),  # used_token given
        (True, False),  # training
    )
)
# 0.4 drops most routes, 3.0 none; 63 tokens divide by nothing; the last three have capacities that
# differ between fp32 and fp64 rounding, for k = 4 and 8, 2, and 8.
SIZES = [(64, 1.0), (63, 1.1), (129, 0.4), (40, 3.0), (45, 1.2), (50, 1.2), (90, 1.1)]


def gates(k, drop, noise, rts, sampling, factor) -> tuple[TopKGate, sharded_moe.TopKGate]:
    args = (HIDDEN, NUM_EXPERTS, k, factor, factor, 4, noise, drop, rts, None, sampling)
    torch.manual_seed(3)
    ours = TopKGate(*args)
    torch.manual_seed(3)
    theirs = sharded_moe.TopKGate(*args)
    assert torch.equal(ours.wg.weight, theirs.wg.weight)
    return ours, theirs


def assert_same_routing(routing: Routing, theirs: tuple, what: str) -> None:
    l_aux, _, _, ids, _, weights, exp_counts = theirs
    assert torch.equal(routing.topk_ids, ids.t().long()), f"{what}: routes differ"
    torch.testing.assert_close(
        routing.topk_weights, weights.t(), rtol=0, atol=0, msg=lambda m: f"{what}: weights {m}"
    )
    assert torch.equal(routing.l_aux, l_aux), f"{what}: l_aux {routing.l_aux} != {l_aux}"
    assert torch.equal(routing.exp_counts, exp_counts), f"{what}: exp_counts differ"


def check_routing(num_tokens: int, factor: float, device: str) -> None:
    num_dropped = 0
    for k, drop, noise, rts, sampling, masked, training in OPTIONS:
        what = f"{k=} {drop=} {noise=} {rts=} {sampling=} {masked=} {training=}"
        ours, theirs = (g.to(device) for g in gates(k, drop, noise, rts, sampling, factor))
        x = torch.randn(num_tokens, HIDDEN, device=device, requires_grad=True)
        used = (torch.rand(num_tokens, device=device) < 0.7).long() if masked else None
        results, grads, states = [], [], []
        for gate in (ours.train(training), theirs.train(training)):
            torch.manual_seed(11)
            if gate is ours:
                results.append(gate.route(x, used))
                weights, l_aux = results[-1].topk_weights, results[-1].l_aux
            else:
                results.append(gate(x, used, True, False))
                weights, l_aux = results[-1][5].t(), results[-1][0]
            states.append(torch.rand(4, device=device))
            loss = l_aux + (weights * torch.linspace(1, 2, k, device=device)).sum()
            grads.append(torch.autograd.grad(loss, [x, gate.wg.weight]))
        assert_same_routing(*results, what)
        assert torch.equal(*states), f"{what}: the draws differ in number"
        for mine, deepspeeds in zip(*grads, strict=True):
            torch.testing.assert_close(mine, deepspeeds, rtol=1e-5, atol=1e-7)
        num_dropped += (results[0].topk_ids < 0).sum().item()
    assert num_dropped > 0


@pytest.mark.parametrize(("num_tokens", "factor"), SIZES)
def test_routing_is_deepspeeds(num_tokens: int, factor: float) -> None:
    check_routing(num_tokens, factor, "cpu")


@pytest.mark.gpu(1)
@pytest.mark.parametrize(("num_tokens", "factor"), SIZES)
def test_routing_is_deepspeeds_on_gpu(num_tokens: int, factor: float) -> None:
    check_routing(num_tokens, factor, "cuda")


def test_capacity_is_rounded_in_fp32() -> None:
    """The sizes above do tell fp32 from fp64."""
    gate, _ = gates(4, True, None, True, True, 1.2)
    assert gate.capacity(45) != math.ceil(45 / NUM_EXPERTS * 1.2 * 4)


def test_draws_are_fresh() -> None:
    """Two seeds give two routings: the parity above is not of constants."""
    gate, _ = gates(1, True, "RSample", True, True, 1.0)
    x = torch.randn(64, HIDDEN)
    routes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        routes.append(gate.route(x).topk_ids)
    assert not torch.equal(*routes)


def test_ties_are_broken_as_deepspeed_breaks_them() -> None:
    """Identical tokens (padding, say) tie for an expert's capacity."""
    for k, rts in ((1, False), (2, True), (4, True)):
        ours, theirs = gates(k, True, None, rts, True, 0.5)
        x = torch.randn(1, HIDDEN).expand(64, HIDDEN).contiguous()
        torch.manual_seed(0)
        routing = ours.route(x)
        torch.manual_seed(0)
        assert_same_routing(routing, theirs(x, None, True, False), f"{k=}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_not_a_number_goes_where_deepspeed_sends_it(k: int, value: float) -> None:
    """A NaN is no error: it must reach the loss, where loss scaling looks for it."""
    ours, theirs = gates(k, True, None, True, True, 1.0)
    x = torch.randn(64, HIDDEN)
    x[5, 3] = value
    torch.manual_seed(0)
    routing = ours.route(x)
    torch.manual_seed(0)
    expected = theirs(x, None, True, False)
    assert torch.equal(routing.topk_ids, expected[3].t().long())
    torch.testing.assert_close(
        routing.topk_weights, expected[5].t(), rtol=0, atol=0, equal_nan=True
    )
    assert routing.l_aux.isnan() and expected[0].isnan()
    kept = routing.topk_ids >= 0
    assert routing.topk_weights[5][kept[5]].isnan().all()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("drop", [True, False])
def test_no_tokens(k: int, drop: bool) -> None:
    """A rank without tokens routes nothing; its loss is zero, not NaN, and carries grad."""
    gate, _ = gates(k, drop, None, True, True, 1.0)
    routing = gate.route(torch.randn(0, HIDDEN))
    assert routing.topk_ids.shape == routing.topk_weights.shape == (0, k)
    assert routing.l_aux.item() == 0
    assert routing.exp_counts.tolist() == [0] * NUM_EXPERTS
    (routing.l_aux + routing.topk_weights.sum()).backward()
    assert gate.wg.weight.grad.abs().sum() == 0


def test_fewer_tokens_than_min_capacity() -> None:
    """DeepSpeed refuses this for k = 1; here nothing is dropped."""
    gate, _ = gates(1, True, None, True, True, 1.0)
    assert (gate.route(torch.randn(2, HIDDEN)).topk_ids >= 0).all()


def test_autocast_parity() -> None:
    """Under autocast DeepSpeed's logits are bf16 and its noise is added in place, in bf16."""
    ours, theirs = gates(2, True, None, True, True, 1.0)
    x = torch.randn(64, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        routing = ours.route(x)
        torch.manual_seed(0)
        assert_same_routing(routing, theirs(x, None, True, False), "autocast")


def test_called_as_a_module_it_is_deepspeeds_gate() -> None:
    """DeepSpeed's inference layer calls the gate itself and wants dense masks."""
    ours, theirs = gates(2, True, None, True, False, 1.0)
    x = torch.randn(64, HIDDEN)
    for mine, deepspeeds in zip(ours(x), theirs(x), strict=True):
        assert torch.equal(mine, deepspeeds)
