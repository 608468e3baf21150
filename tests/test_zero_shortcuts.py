# SPDX-License-Identifier: Apache-2.0
"""What ZeRO is spared for stacked experts changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training import build_engine, config, train

from comet_ds import engine_hooks, zero_shortcuts


def check_same_bits(
    rank: int, size: int, stage: int, ep_size: int, precision: str, overlap_comm: bool
) -> tuple[int, int]:
    """Train with and without; return how many stacks were reduced with and without DeepSpeed."""
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "overlap_comm": overlap_comm},
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
    }
    dtype = torch.float32
    if precision == "bf16":
        settings["bf16"], dtype = {"enabled": True}, torch.bfloat16
    losses, weights, counts = [], [], (0, 0)
    install = zero_shortcuts.install_shortcuts
    for is_on in (False, True):
        engine_hooks.install_shortcuts = install if is_on else lambda *_: None
        try:
            engine = build_engine("comet_ds", config(size, **settings), ep_size=ep_size, k=2)
        finally:
            engine_hooks.install_shortcuts = install
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
    if isinstance(outer, zero_shortcuts._LoneDivided):
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
)
def test_same_bits(world, stage: int, ep_size: int, precision: str, overlap_comm: bool) -> None:
    """8 stacks, reduced in each of 4 steps once with ZeRO 1, after both micro-batches with ZeRO 2.

    With overlap_comm, which reduces on another stream, and with replicas DeepSpeed does it.
    """
    num_reductions = 8 * 4 * stage
    is_spared = ep_size == 2 and not overlap_comm
    for spared, by_deepspeed in world(2).run(
        check_same_bits, stage, ep_size, precision, overlap_comm
    ):
        assert (spared, by_deepspeed) == ((num_reductions, 0) if is_spared else (0, num_reductions))


def check_pieces(rank: int, size: int) -> None:
    """Norms of gradients in pieces are those of whole ones to fp64's rounding."""
    norms, num_norms = [], []
    for pieces in (10**9, 100):
        zero_shortcuts.NORM_PIECE_NUMEL = pieces
        settings = config(size, zero_optimization={"stage": 1}, gradient_clipping=0.1)
        engine = build_engine("comet_ds", settings, ep_size=2, k=2)
        shortcut = engine.optimizer.get_grad_norm_direct
        original = shortcut._original

        def noting(gradients: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            num_norms.append(len(gradients))
            return original(gradients, *args, **kwargs)

        shortcut._original = noting
        train(engine, rank, 1)
        norms.append(float(engine.get_global_grad_norm()))
        engine.destroy()
    half = len(num_norms) // 2
    assert sum(num_norms[half:]) > 3 * sum(num_norms[:half])
    assert abs(norms[0] - norms[1]) <= 2e-7 * norms[0] and norms[0] > 0


def test_norms_of_pieces(world) -> None:
    world(2).run(check_pieces)
