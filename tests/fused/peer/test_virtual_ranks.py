# SPDX-License-Identifier: Apache-2.0
"""Expert parallel groups on virtual ranks: all ranks' kernels run together on one GPU.

Outputs and gradients are as close to fp64 as those of DeepSpeed's layer with all experts, whatever
tokens the ranks bring and wherever they go. The bits are the same in every run and with every CTA
split.
"""

from __future__ import annotations

import pytest
import torch
from helpers.mlp_forms import BF16, FP16
from helpers.parity import build, oracle, run
from helpers.peer_layers import (
    SHAPES,
    all_experts,
    draw_cases,
    expert_grads,
    options_for,
    run_deepspeed,
)
from helpers.tolerance import assert_as_accurate, assert_close, relative_error
from helpers.virtual_ranks import NUM_SMS, VirtualGroup, both_ways

from comet_ds import MoE
from comet_ds.fused.peer.exposure import ExposureMeter
from comet_ds.tuning.cost_model import choose_split
from comet_ds.tuning.table import candidates


def check_against_fp64(
    num_ranks: int, num_tokens: list[int], shape: tuple[int, ...], form: str, dtype: torch.dtype
) -> None:
    """Errors are at most 1.5 times those of DeepSpeed's layer with all experts, rank by rank.

    The bits are the same in every run, and however tokens come.
    """
    options = options_for(shape, form, dtype)
    group = VirtualGroup(num_ranks, comet_ds={"exact_gate": True}, **options)
    xs, grads = draw_cases(num_tokens, shape[2], dtype)
    got = group.run(xs, grads)
    again = [group.run(xs, grads)]
    for cta_split in both_ways(group.layers[0].deepspeed_moe.fused.cta_split):
        for exchange in group.exchanges:
            exchange.policy.pinned = cta_split
        again.append(group.run(xs, grads))
    theirs, truths = [], []
    where = f"{form} {shape} {num_tokens} {dtype}"
    for rank, (ours, *same) in enumerate(zip(got, *again, strict=True)):
        for other in same:
            assert all(torch.equal(ours[what], other[what]) for what in ours), f"{where}: not same"
        if num_tokens[rank] == 0:
            continue
        x, grad = xs[rank], grads[rank]
        truth = oracle(group.layers[rank], x, grad, all_experts(shape, form, dtype))
        deepspeed = run_deepspeed(x, grad, options)
        truths.append(truth)
        theirs.append(deepspeed)
        for what in ("output", "grad of x"):
            assert_as_accurate(ours[what], deepspeed[what], truth[what], f"{where}: {what}")
        assert_close(ours["l_aux"], deepspeed["l_aux"], f"{where}: l_aux")
        if num_tokens[rank] > 8 and shape[1] < shape[0]:
            gates = [r["grad of deepspeed_moe.gate.wg.weight"] for r in (ours, deepspeed)]
            assert_as_accurate(*gates, truth["grad of gate"], f"{where}: grad of gate")
    truth = sum(torch.cat([g.flatten() for g in t["grads of experts"]]) for t in truths)
    summed = sum(expert_grads([r]) for r in theirs)
    assert_as_accurate(expert_grads(got), summed, truth, f"{where}: grads of experts")


@pytest.mark.gpu(1)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_virtual_ranks(num_ranks: int, shape: tuple[int, ...]) -> None:
    """As many tokens on every rank; then one, none, and more than a tile of 128 on some."""
    for num_tokens in ([129] * 8, [63, 1, 7, 300, 0, 129, 64, 5]):
        check_against_fp64(num_ranks, num_tokens[:num_ranks], shape, "swiglu", BF16)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", ["gelu with biases", "swiglu with biases", "relu with biases"])
def test_virtual_ranks_forms(form: str, dtype: torch.dtype) -> None:
    """Biases are added once, where the expert is; two matrices and three."""
    check_against_fp64(2, [200, 129], (8, 2, 128, 192), form, dtype)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_virtual_ranks_drop_tokens(num_ranks: int, k: int) -> None:
    """Same routes and result as a layer with all experts; NaN in one call, not in the next."""
    shape = (8, k, 128, 192)
    options = {**options_for(shape, "swiglu", BF16), "drop_tokens": True, "capacity_factor": 0.6}
    group = VirtualGroup(num_ranks, **options)
    alone = build(MoE, 0, device="cuda", comet_ds={"path": "fused"}, **options)
    xs, grads = draw_cases([300, 129, 63, 64][:num_ranks], 128, BF16)
    spoilt = [x.clone() for x in xs]
    spoilt[1][5] = float("nan")
    first = group.run(xs, grads)
    assert group.run(spoilt, grads)[1]["output"].isnan().any()
    got = group.run(xs, grads)
    expected = [run(alone, x, grad) for x, grad in zip(xs, grads, strict=True)]
    for ours, same, theirs in zip(got, first, expected, strict=True):
        for what in ("output", "l_aux", "grad of x", "grad of deepspeed_moe.gate.wg.weight"):
            assert torch.equal(ours[what], same[what])
            assert_close(ours[what], theirs[what], what)
    total = sum(expert_grads([r]) for r in expected)
    assert relative_error(expert_grads(got), total) < 1e-2


@pytest.mark.gpu(1)
def test_virtual_ranks_skewed() -> None:
    """All tokens of all ranks to the experts of one."""
    shape = (8, 2, 128, 192)
    options = options_for(shape, "swiglu", BF16) | {"top2_2nd_expert_sampling": False}
    group = VirtualGroup(4, **options)
    alone = build(MoE, 0, device="cuda", comet_ds={"path": "fused"}, **options)
    xs, grads = draw_cases([129, 300, 63, 64], 128, BF16)
    for layer in (alone, *group.layers):
        with torch.no_grad():
            layer.deepspeed_moe.gate.wg.weight[4:6].fill_(1.0)
            layer.deepspeed_moe.gate.wg.weight[:4].fill_(-1.0)
            layer.deepspeed_moe.gate.wg.weight[6:].fill_(-1.0)
    xs = [x.abs() for x in xs]
    got = group.run(xs, grads)
    for x, grad, ours in zip(xs, grads, got, strict=True):
        theirs = run(alone, x, grad)
        for what in ("output", "grad of x"):
            assert_close(ours[what], theirs[what], what)
    ids = group.layers[0].deepspeed_moe.routing.topk_ids
    assert ids.min() >= 4 and ids.max() <= 5


def spread_routing(
    layers: list[MoE], xs: list[torch.Tensor], variation: float
) -> list[torch.Tensor]:
    """Make experts differ in popularity, by a coefficient of variation of their tokens.

    Returns inputs like ``xs``; changes the gates' weights, to the same on all layers.
    """
    xs = [x.clone() for x in xs]
    for x in xs:
        x[:, 0] = 1.0
    weights = [layer.deepspeed_moe.gate.wg.weight for layer in layers]
    first, slope = weights[0].detach().clone(), torch.linspace(-1, 1, len(weights[0]))
    for step in range(500):
        first[:, 0] = 0.01 * step * slope.to(first)
        with torch.no_grad():
            for weight in weights:
                weight.copy_(first)
            logits = torch.cat(xs).float() @ first.float().t()
        top_k = layers[0].deepspeed_moe.gate.k
        counts = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=len(first)).float()
        found = (counts.std(correction=0) / counts.mean()).item()
        if found >= variation:
            assert found < 1.1 * variation, f"{found}, not {variation}"
            return xs
    raise AssertionError(f"no gate gives a variation of {variation}")


@pytest.mark.gpu(1)
@pytest.mark.parametrize("variation", [0.26, 0.40])
def test_virtual_ranks_uneven_experts(variation: float) -> None:
    """Experts that differ in popularity as those of trained models do, and more."""
    options = options_for((16, 4, 128, 192), "swiglu", BF16)
    group = VirtualGroup(4, **options)
    alone = build(MoE, 0, device="cuda", comet_ds={"path": "fused"}, **options)
    xs, grads = draw_cases([400, 300, 630, 64], 128, BF16)
    xs = spread_routing([alone, *group.layers], xs, variation)
    got = group.run(xs, grads)
    for x, grad, ours in zip(xs, grads, got, strict=True):
        theirs = run(alone, x, grad)
        for what in ("output", "grad of x", "grad of deepspeed_moe.gate.wg.weight"):
            assert_close(ours[what], theirs[what], what)


@pytest.mark.gpu(1)
def test_exposure() -> None:
    """What communication takes from computation is measured where someone asks, and nothing else
    changes."""
    group = VirtualGroup(2, **options_for((8, 2, 1024, 256), "swiglu", BF16))
    xs, grads = draw_cases([700, 600], 1024, BF16)
    expected = group.run(xs, grads)
    fused = [layer.deepspeed_moe.fused for layer in group.layers]
    for one in fused:
        one.meter = ExposureMeter(torch.device("cuda"))
    got = [group.run(xs, grads) for _ in range(2)][1]
    for rank, one in enumerate(fused):
        assert all(torch.equal(got[rank][what], value) for what, value in expected[rank].items())
        found, on_one_sm = one.meter.read(NUM_SMS), one.meter.read(1)
        assert list(found) == ["forward", "backward"]
        for direction, ms in found.items():
            assert 0 < ms < 1e3
            assert on_one_sm[direction] > ms, "no CTA has communicated"


@pytest.mark.gpu(1)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_cta_split_computes_the_same(num_ranks: int) -> None:
    """Whatever a tuner may choose is compiled and runs, to the same bits."""
    group = VirtualGroup(num_ranks, **options_for((16, 2, 1024, 256), "swiglu", BF16))
    xs, grads = draw_cases([700, 600, 0, 500][:num_ranks], 1024, BF16)
    expected = group.run(xs, grads)
    shape = group.layers[0].deepspeed_moe.fused.shape
    default = choose_split(shape)
    cta_splits = [d for found in candidates(default, shape).values() for d in found]
    splits = range(16 // num_ranks + 1)
    cta_splits += [
        default._replace(push=default.push._replace(num_split_experts=n)) for n in splits
    ]
    cta_splits += both_ways(default)
    assert len(cta_splits) >= 16
    for cta_split in cta_splits:
        for exchange in group.exchanges:
            exchange.policy.pinned = cta_split
        got = group.run(xs, grads)
        used = [layer.deepspeed_moe.fused.cta_split for layer in group.layers]
        assert used == [cta_split] * num_ranks
        for ours, before in zip(got, expected, strict=True):
            different = [
                what for what, value in before.items() if not torch.equal(ours[what], value)
            ]
            assert not different, f"{cta_split}: {different}"
