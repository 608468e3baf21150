# SPDX-License-Identifier: Apache-2.0
"""The gate decides what the installed DeepSpeed decides, from the same draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from deepspeed.moe import sharded_moe
from helpers.tolerance import relative_error

from comet_ds.gate.routing import Routing
from comet_ds.gate.topk_gate import TopKGate
from comet_ds.kernels import load_kernels

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
# Tokens and capacity factor.
SIZES: dict[str, tuple[int, float]] = {
    "even": (64, 1.0),
    "tokens divide by nothing": (63, 1.1),
    "most routes are dropped": (129, 0.4),
    "no route is dropped": (40, 3.0),
    "capacity rounds otherwise in fp64, k=4 and 8": (45, 1.2),
    "capacity rounds otherwise in fp64, k=2": (50, 1.2),
    "capacity rounds otherwise in fp64, k=8": (90, 1.1),
}


def gates(k, drop, noise, rts, sampling, factor) -> tuple[TopKGate, sharded_moe.TopKGate]:
    args = (HIDDEN, NUM_EXPERTS, k, factor, factor, 4, noise, drop, rts, None, sampling)
    torch.manual_seed(3)
    ours = TopKGate(*args)
    torch.manual_seed(3)
    theirs = sharded_moe.TopKGate(*args)
    assert torch.equal(ours.wg.weight, theirs.wg.weight)
    return ours, theirs


def assert_same_routing(routing: Routing, theirs: tuple, what: str) -> None:
    """Decisions equal; on the CPU to the bit, the kernels sum in another order."""
    l_aux, _, _, ids, _, weights, exp_counts = theirs
    ids, weights = ids.t().long(), weights.t()
    got_ids, got_weights = routing.topk_ids, routing.topk_weights
    rtol = 0
    if (
        routing.slot_in_expert is not None
    ):  # torch.topk on CUDA orders a token's equal choices at random
        rtol = 2e-6
        (got_ids, order), (ids, their_order) = (i.sort(dim=1, stable=True) for i in (got_ids, ids))
        got_weights, weights = got_weights.gather(1, order), weights.gather(1, their_order)
    different = (got_ids != ids).any(dim=1).nonzero().flatten().tolist()
    assert not different, f"{what}: {len(different)} tokens differ, first {different[:3]}"
    for name, got, expected in (
        ("weights", got_weights, weights),
        ("l_aux", routing.l_aux, l_aux),
    ):
        torch.testing.assert_close(
            got,
            expected,
            rtol=rtol,
            atol=0,
            equal_nan=True,
            msg=lambda m, name=name: f"{what}: {name} {m}",
        )
    assert torch.equal(routing.exp_counts, exp_counts), f"{what}: exp_counts differ"
    if routing.slot_in_expert is not None:
        assert_ranks(routing, what)


def assert_ranks(routing: Routing, what: str) -> None:
    """An expert's kept routes are numbered by token."""
    for expert, count in enumerate(routing.kept_counts.tolist()):
        ranks = routing.slot_in_expert[routing.topk_ids == expert]
        assert ranks.tolist() == list(range(count)), f"{what}: expert {expert}: {ranks}"
    assert (routing.slot_in_expert[routing.topk_ids < 0] == -1).all()


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
        atol = 1e-7 if device == "cpu" else 1e-6  # sums of about 1, in another order
        for mine, deepspeeds in zip(*grads, strict=True):
            torch.testing.assert_close(mine, deepspeeds, rtol=1e-5, atol=atol)
        num_dropped += (results[0].topk_ids < 0).sum().item()
    assert num_dropped > 0


@pytest.mark.parametrize(("num_tokens", "factor"), SIZES.values(), ids=SIZES)
def test_routing_is_deepspeeds(num_tokens: int, factor: float) -> None:
    check_routing(num_tokens, factor, "cpu")


@pytest.mark.gpu(1)
@pytest.mark.parametrize(("num_tokens", "factor"), SIZES.values(), ids=SIZES)
def test_routing_is_deepspeeds_on_gpu(num_tokens: int, factor: float) -> None:
    check_routing(num_tokens, factor, "cuda")


@pytest.mark.gpu(1)
@pytest.mark.parametrize("k", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts"),
    [(8192, 64), (5000, 128), (20000, 12), (2000, 200), (2000, 320)],
    ids=["powers of two", "128 experts", "many tokens an expert", "200 experts", "320 experts"],
)
@pytest.mark.parametrize("factor", [0.3, 1.0, 2.0])
def test_large_routing_is_deepspeeds(
    num_tokens: int, num_experts: int, factor: float, k: int
) -> None:
    """Many words of the kernels' bitmaps; rounded probabilities, so that there are ties."""
    args = (HIDDEN, num_experts, k, factor, factor, 4, None, True, True, None, True)
    torch.manual_seed(3)
    ours = TopKGate(*args).cuda()
    torch.manual_seed(3)
    theirs = sharded_moe.TopKGate(*args).cuda()
    x = torch.randint(-1, 2, (num_tokens, HIDDEN), device="cuda").float()
    x[: num_tokens // 3] = x[0]
    for gate in (ours, theirs):
        gate.wg.weight.data = (gate.wg.weight.data * 8).round() / 8
    torch.manual_seed(0)
    routing = ours.route(x)
    torch.manual_seed(0)
    assert_same_routing(routing, theirs(x, None, True, False), f"{k=}")


@pytest.mark.gpu(1)
@pytest.mark.parametrize("has_reader", [False, True], ids=["x read once", "x read twice"])
@pytest.mark.parametrize(("hidden", "num_experts"), [(2048, 64), (4096, 8), (2048, 128)])
def test_fast_logits_are_as_close_as_deepspeeds(
    hidden: int, num_experts: int, has_reader: bool
) -> None:
    """Against fp64, logits and gradients, x's also with that of another reader of x."""
    x = torch.randn(4096, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(num_experts, hidden, device="cuda") * 0.02
    weight = weight.bfloat16().requires_grad_()
    grad = torch.randn(4096, num_experts, device="cuda")
    grad_read = torch.randn_like(x) * 0.1  # as large as the gate's, so that neither hides the other
    kernels = load_kernels(x.device)
    kinds = {"fast": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    results = {}
    for name, dtype in kinds.items():
        leaves = [x, weight]
        if name == "fp64":  # gradients unrounded
            leaves = [t.detach().double().requires_grad_() for t in leaves]
        if name == "fast":
            logits = kernels.gate_logits(x.detach(), weight.detach())
            add_to = grad_read.clone() if has_reader else None
            operands = x.detach(), weight.detach()
            grads = kernels.gate_logits_backward(grad, *operands, add_to=add_to)
            results[name] = [logits, *grads]
            continue
        logits = torch.nn.functional.linear(*(t.to(dtype) for t in leaves))
        outputs, grads = [logits], [grad.to(logits.dtype)]
        if has_reader:
            outputs.append(leaves[0] * 1)
            grads.append(grad_read.to(leaves[0].dtype))
        results[name] = [logits, *torch.autograd.grad(outputs, leaves, grads)]
    for what, fast, fp32, fp64 in zip(("logits", "x", "weight"), *results.values(), strict=True):
        error, limit = relative_error(fast, fp64), relative_error(fp32, fp64)
        # Gradients are rounded to bf16.
        assert error <= limit * (1 if what == "logits" else 1.01), f"{what}: {error} > {limit}"


@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    ("num_tokens", "hidden", "num_experts"),
    [(1, 64, 8), (100, 72, 200), (129, 1032, 12)],
    ids=["one token, one step", "tiles of experts in part", "seventeen steps, the last in part"],
)
def test_fast_logits_of_odd_sizes(num_tokens: int, hidden: int, num_experts: int) -> None:
    x = torch.randn(num_tokens, hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(num_experts, hidden, device="cuda", dtype=torch.bfloat16)
    logits = load_kernels(x.device).gate_logits(x, weight)
    assert relative_error(logits, x.double() @ weight.double().t()) < 1e-6


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


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu(1))]


@pytest.mark.parametrize("device", DEVICES)
def test_ties_are_broken_as_deepspeed_breaks_them(device: str) -> None:
    """Identical tokens (padding, say) tie for an expert's capacity."""
    for k, rts in ((1, False), (2, True), (4, True)):
        ours, theirs = (g.to(device) for g in gates(k, True, None, rts, True, 0.5))
        x = torch.randn(1, HIDDEN, device=device).expand(64, HIDDEN).contiguous()
        torch.manual_seed(0)
        routing = ours.route(x)
        torch.manual_seed(0)
        assert_same_routing(routing, theirs(x, None, True, False), f"{k=}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_not_a_number_goes_where_deepspeed_sends_it(k: int, value: float, device: str) -> None:
    """A NaN is no error: it must reach the loss, where loss scaling looks for it."""
    ours, theirs = (g.to(device) for g in gates(k, True, None, True, True, 1.0))
    x = torch.randn(64, HIDDEN, device=device)
    x[5, 3] = value
    torch.manual_seed(0)
    routing = ours.route(x)
    torch.manual_seed(0)
    expected = theirs(x, None, True, False)
    assert_same_routing(routing, expected, f"{k=} {value}")
    assert routing.l_aux.isnan() and expected[0].isnan()
    kept = routing.topk_ids >= 0
    assert routing.topk_weights[5][kept[5]].isnan().all()


@pytest.mark.parametrize("result", ["weights", "l_aux"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_one_result_alone(result: str, device: str) -> None:
    ours, theirs = (g.to(device) for g in gates(4, True, None, True, True, 1.0))
    x = torch.randn(64, HIDDEN, device=device)
    routing, (l_aux, _, _, _, _, weights, _) = ours.route(x), theirs(x, None, True, False)
    factors = torch.linspace(1, 2, 4, device=device)
    if result == "weights":
        losses = [(w * factors).sum() for w in (routing.topk_weights, weights.t())]
    else:
        losses = [routing.l_aux, l_aux]
    pairs = zip(losses, (ours, theirs), strict=True)
    grads = [torch.autograd.grad(loss, gate.wg.weight)[0] for loss, gate in pairs]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("drop", [True, False], ids=["dropping", "dropless"])
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
