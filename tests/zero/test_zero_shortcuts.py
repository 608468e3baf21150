# SPDX-License-Identifier: Apache-2.0
"""Shortcuts past ZeRO for stacked experts change no bit.

Gradients that no other rank has are not reduced, norms are summed once: weights, losses and norms
are those without the shortcuts, also where training is interrupted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.tolerance import assert_close, assert_few_steps
from helpers.training import batches, build_engine, config, train

from comet_ds.zero import hooks as engine_hooks
from comet_ds.zero import norm as zero_norm
from comet_ds.zero import shortcuts as zero_shortcuts


@contextlib.contextmanager
def shortcuts(is_on: bool) -> Iterator[None]:
    """Have engines built meanwhile take the shortcuts, or not."""
    install = engine_hooks.install_shortcuts
    engine_hooks.install_shortcuts = install if is_on else lambda *_: None
    try:
        yield
    finally:
        engine_hooks.install_shortcuts = install


def check_same_bits(
    rank: int, size: int, stage: int, ep_size: int, precision: str, overlap_comm: bool
) -> tuple[int, int]:
    """Train with and without; return how many stacks were reduced with and without DeepSpeed."""
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "overlap_comm": overlap_comm},
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.1,
    }
    dtype = torch.float32
    if precision == "bf16":
        settings["bf16"], dtype = {"enabled": True}, torch.bfloat16
    losses, weights, counts = [], [], (0, 0)
    for is_on in (False, True):
        with shortcuts(is_on):
            engine = build_engine("comet_ds", config(size, **settings), ep_size=ep_size, k=2)
        stacks = {id(p) for n, p in engine.module.named_parameters() if "_stacked" in n}
        assert len(stacks) == 8
        calls = count_reductions(engine.optimizer, stacks)
        losses.append(train(engine, rank, 4, dtype))
        weights.append([p.detach().clone() for p in engine.module.parameters()])
        counts = len(calls["all"]) - len(calls["deepspeed"]), len(calls["deepspeed"])
        engine.destroy()
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return counts


def count_reductions(optimizer: Any, stacks: set[int]) -> dict[str, list[int]]:
    """Note every call that reduces a stack, and those that reach DeepSpeed's method."""
    name = "reduce_independent_p_g_buckets_and_remove_grads"
    calls: dict[str, list[int]] = {"all": [], "deepspeed": []}

    def noting(kind: str, method: Any) -> Any:
        def call(param: Any, i: int) -> Any:
            if id(param) in stacks:
                calls[kind].append(id(param))
            return method(param, i)

        return call

    outer = getattr(optimizer, name)
    if isinstance(outer, zero_shortcuts._ReduceByDividing):
        outer._original = noting("deepspeed", outer._original)
        setattr(optimizer, name, noting("all", outer))
    else:
        both = noting("all", outer)
        setattr(optimizer, name, noting("deepspeed", both))
    return calls


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("ep_size", "precision", "overlap_comm"),
    [(2, "fp32", False), (2, "bf16", False), (1, "fp32", False), (2, "fp32", True)],
    ids=["fp32", "bf16", "replicas", "overlap_comm"],
)
def test_same_bits(world, stage: int, ep_size: int, precision: str, overlap_comm: bool) -> None:
    """8 stacks are reduced once in each of 4 steps with ZeRO 1, three times with ZeRO 2.

    With overlap_comm, which reduces on another stream, and with replicas DeepSpeed does it.
    """
    num_reductions = 8 * 4 * (1 if stage == 1 else 3)
    is_spared = ep_size == 2 and not overlap_comm
    for spared, by_deepspeed in world(2).run(
        check_same_bits, stage, ep_size, precision, overlap_comm
    ):
        assert (spared, by_deepspeed) == ((num_reductions, 0) if is_spared else (0, num_reductions))


def check_norms(rank: int, size: int) -> None:
    """The norm and what it clips to are DeepSpeed's."""
    found = []
    for is_on in (False, True):
        settings = config(size, zero_optimization={"stage": 1}, gradient_clipping=0.1)
        with shortcuts(is_on):
            engine = build_engine("comet_ds", settings, ep_size=2, k=2)
        optimizer = engine.optimizer
        assert isinstance(optimizer.scaled_global_norm, zero_norm._NormOfAllGroups) == is_on
        train(engine, rank, 1)
        norms = {"healthy": engine.get_global_grad_norm()}
        for bad in (math.inf, math.nan):
            rows = [torch.ones(3)] + [torch.ones(2)] * (len(optimizer.bit16_groups) - 1)
            rows[-1] = torch.tensor([1.0, bad])
            optimizer.averaged_gradients = {i: [row] for i, row in enumerate(rows)}
            norms[str(bad)] = optimizer.scaled_global_norm()
        grads = [torch.full((5,), 3.0), [torch.full((2,), -1.0)]]
        optimizer.unscale_and_clip_grads(grads, torch.tensor(7.0))
        found.append(({name: float(norm) for name, norm in norms.items()}, grads[0], grads[1][0]))
        engine.destroy()
    (norms, *grads), (expected_norms, *expected_grads) = found
    assert norms["healthy"] > 0.1, "nothing is clipped"
    assert norms == expected_norms
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_norms(world) -> None:
    world(2).run(check_norms)


def check_interrupted(rank: int, size: int, what: str) -> None:
    """Micro-batches without a layer, or after which gradients are cleared, add up as before."""
    weights = []
    for is_on in (False, True):
        more = {"managed_gradient_accumulation": False} if what == "unmanaged" else {}
        settings = config(
            size, zero_optimization={"stage": 2}, gradient_accumulation_steps=3, **more
        )
        with shortcuts(is_on):
            engine = build_engine("comet_ds", settings, ep_size=2, k=1)
        layers = engine.module.moe
        for i, (x, target) in enumerate(batches(rank, 6)):
            is_unused = what == "unused layer" and i % 3 > 0  # in the last one, too
            engine.module.moe = layers[:1] if is_unused else layers
            engine.backward(engine(x, target))
            if what == "cleared":
                engine.module.zero_grad()
            if what != "unmanaged" or i % 3 == 2:
                engine.step()
        engine.module.moe = layers
        weights.append([p.detach().clone() for p in engine.module.parameters()])
        engine.destroy()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("what", ["unused layer", "cleared", "unmanaged"])
def test_interrupted_micro_batches(world, what: str) -> None:
    world(2).run(check_interrupted, what)


def check_reduced(rank: int, size: int, ep_size: int, options: dict) -> None:
    """Gradients that nobody else has are divided as DeepSpeed divides them."""
    weights = []
    for is_on in (False, True):
        settings = {"gradient_accumulation_steps": 2, **options}
        with shortcuts(is_on):
            engine = build_engine("comet_ds", config(size, **settings), ep_size=ep_size, k=2)
        assert ("allreduce_and_copy" in vars(engine)) == is_on
        train(engine, rank, 3)
        weights.append([p.detach().clone() for p in engine.module.parameters()])
        engine.destroy()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("ep_size", "options"),
    [
        (2, {}),
        (1, {}),
        (2, {"prescale_gradients": True}),
        (2, {"gradient_predivide_factor": 2.0}),
        (2, {"communication_data_type": "bf16"}),
    ],
    ids=["parallel experts", "replicas", "prescaled", "divided before", "sent in bf16"],
)
def test_reduced_without_zero(world, ep_size: int, options: dict) -> None:
    world(2).run(check_reduced, ep_size, options)


def check_unsharded(rank: int, size: int) -> None:
    """Without ZeRO: the same overflows; norms and losses but for the rounding of a norm."""
    found = []
    for is_on, disturbance in ((False, 0), (True, 0), (False, 1)):
        settings = {"bf16": {"enabled": True}, "gradient_clipping": 0.1}
        with shortcuts(is_on):
            engine = build_engine("comet_ds", config(size, **settings), ep_size=2, k=2)
        checker, optimizer = engine.optimizer.overflow_checker, engine.optimizer
        assert ("has_overflow_serial" in vars(checker)) == is_on
        losses = train(engine, rank, 4, torch.bfloat16, disturbance)
        norm = float(engine.get_global_grad_norm())
        overflows = []
        for value in (1.0, math.inf, -math.inf, math.nan):
            for param in checker.params:
                param.grad = torch.ones_like(param)
            checker.params[-1].grad.view(-1)[-1] = value
            overflows.append(checker.check())
        for param in checker.params:
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()
        found.append((losses, [norm], float(optimizer._global_grad_norm), overflows))
        engine.destroy()
    losses, norms, filled, overflows = zip(*found, strict=True)
    assert overflows[0] == overflows[1] == [False, True, True, True]
    for what, (expected, got, noisy) in {"losses": losses, "norm": norms}.items():
        assert_few_steps(got, expected, noisy, what)
    assert_close(torch.tensor(filled[1]), torch.tensor(filled[0]), "norm of equal gradients")
    assert filled[0] > 0


def test_unsharded_norms(world) -> None:
    world(2).run(check_unsharded)
