# SPDX-License-Identifier: Apache-2.0
"""Training through DeepSpeed's engine: the same curves as with its layer, checkpoints both ways."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from helpers.experts_zoo import sequential
from helpers.tolerance import CURVE_NOISE, assert_close, assert_few_steps
from helpers.training import (
    BF16,
    CLASSES,
    FFN,
    HIDDEN,
    NUM_EXPERTS,
    OFFLOAD,
    PipeMoE,
    batches,
    build_engine,
    config,
    train,
    zero,
)
from torch import nn

import comet_ds

STEPS = 50
CLIP = {"gradient_clipping": 0.1}


Curve = list[float]
_noise: dict[Any, Curve] = {}  # of this process, by what the curves depend on


def differences(curve: Curve, other: Curve, dtype: torch.dtype) -> Curve:
    """Return the relative difference of two loss curves in each tenth of them.

    The largest one in fp32. In half precision a rounding flips a route now and then, and the means
    are compared.
    """
    a, b = (torch.tensor(c).view(10, -1) for c in (curve, other))
    if dtype != torch.float32:
        a, b = a.mean(dim=1), b.mean(dim=1)
    return ((a - b).abs() / b.abs()).view(10, -1).amax(dim=1).tolist()


def curve_error(
    ours: Curve, theirs: Curve, run: Callable[[int], Curve], dtype: torch.dtype, key: Any
) -> float:
    """Return how far two loss curves are apart, in multiples of the reference's noise.

    Args:
        run: trains the reference with a disturbance; see ``batches``.
        key: what the noise depends on; curves with the same key share it.

    In each tenth, the noise is the largest so far or in the next one, since a route that flips may
    do so a little earlier.
    """
    assert sum(theirs[-5:]) < 0.8 * sum(theirs[:5]), "the reference run does not learn"
    if key not in _noise:
        found = [differences(run(disturbance), theirs, dtype) for disturbance in (1, 2)]
        _noise[key] = [max(pair) for pair in zip(*found, strict=True)]
    noise = [max(_noise[key][: tenth + 2]) for tenth in range(10)]
    return max(d / n for d, n in zip(differences(ours, theirs, dtype), noise, strict=True))


def check_curve(rank: int, size: int, settings: dict, options: dict, dtype: torch.dtype) -> float:
    """Return how far the two layers' loss curves are apart, see ``curve_error``."""

    def run(kind: str, disturbance: int = 0) -> Curve:
        extra = {} if kind == "deepspeed" else {"comet_ds": {"num_chunks": 2}}
        engine = build_engine(kind, config(size, **settings, **extra), **options)
        curve = train(engine, rank, STEPS, dtype, disturbance)
        engine.destroy()
        return curve

    # ZeRO's stages, offload and the like change where numbers are, not what they are.
    key = [size, dtype, *sorted(options.items())]
    key += [settings.get(name) for name in ("gradient_accumulation_steps", "gradient_clipping")]
    disturbed = functools.partial(run, "deepspeed")
    return curve_error(run("comet_ds"), run("deepspeed"), disturbed, dtype, tuple(key))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_fp32_loss_curves(world, stage: int, k: int) -> None:
    error = max(world(2).run(check_curve, zero(stage), {"ep_size": 2, "k": k}, torch.float32))
    print(f"ZeRO {stage}, k={k}: {error:.1f} times the noise over {STEPS} steps")
    assert error <= CURVE_NOISE


ENGINES = {
    "replicas and parallel experts": (4, zero(1), {"ep_size": 2, "k": 2}, torch.float32),
    "ep_size 1": (2, zero(2), {"ep_size": 1, "k": 2}, torch.float32),
    "clipping": (2, {**zero(1), **CLIP}, {"ep_size": 2, "k": 1}, torch.float32),
    "accumulation": (
        2,
        {**zero(2), "gradient_accumulation_steps": 3},
        {"ep_size": 2, "k": 2},
        torch.float32,
    ),
    "optimizer offload": (2, OFFLOAD, {"ep_size": 2, "k": 2}, torch.float32),
    "overlap_comm": (2, zero(2, overlap_comm=True), {"ep_size": 2, "k": 2}, torch.float32),
    "comms_logger": (
        2,
        {**zero(1), "comms_logger": {"enabled": True}},
        {"ep_size": 2, "k": 2},
        torch.float32,
    ),
    "checkpointing": (2, zero(1), {"ep_size": 2, "k": 2, "checkpointing": True}, torch.float32),
    "jitter, residual": (
        2,
        zero(1),
        {"ep_size": 2, "k": 2, "noisy_gate_policy": "Jitter", "use_residual": True},
        torch.float32,
    ),
    "no dropping": (2, zero(1), {"ep_size": 2, "drop_tokens": False}, torch.float32),
    "bf16, ZeRO 1": (2, {**zero(1), **BF16}, {"ep_size": 2, "k": 2}, torch.bfloat16),
    "bf16, ZeRO 2": (2, {**zero(2), **BF16}, {"ep_size": 2, "k": 1}, torch.bfloat16),
}


@pytest.mark.parametrize("name", ENGINES)
def test_engine_settings(world, name: str) -> None:
    size, settings, options, dtype = ENGINES[name]
    error = max(world(size).run(check_curve, settings, options, dtype))
    print(f"{name}: {error:.1f} times the noise over {STEPS} steps")
    assert error <= CURVE_NOISE


# ---- checkpoints -------------------------------------------------------------------------------


def check_checkpoint(
    rank: int, size: int, folder: str, first: str, then: str, stage: int, **more: Any
) -> None:
    """Train with one layer, save; load with the other, and go on as if nothing had happened."""

    def build(kind: str) -> Any:
        block = {"comet_ds": {"stack_experts": False}} if kind == "unstacked" else {}
        settings = config(size, **zero(stage), **more, **block)
        kind = "comet_ds" if kind == "unstacked" else kind
        return build_engine(kind, settings, ep_size=size, k=2)

    engine = build(first)
    train(engine, rank, 5)
    engine.save_checkpoint(folder, tag="t")
    expected = train(engine, rank, 5)
    engine.load_checkpoint(folder, tag="t")
    noisy = train(engine, rank, 5, disturbance=1)
    engine.destroy()
    torch.manual_seed(99)
    other = build(then)
    with torch.no_grad():
        for param in other.module.parameters():
            param.add_(1.0)  # the file must restore every one
    path, _ = other.load_checkpoint(folder, tag="t")
    assert path is not None
    assert_few_steps(train(other, rank, 5), expected, noisy, f"{first} -> {then}")
    other.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("deepspeed", "comet_ds"),
        ("comet_ds", "deepspeed"),
        ("comet_ds", "comet_ds"),
        ("unstacked", "comet_ds"),
        ("comet_ds", "unstacked"),
    ],
)
def test_checkpoints(world, tmp_path: Path, first: str, then: str, stage: int) -> None:
    world(2).run(check_checkpoint, str(tmp_path), first, then, stage)
    experts = [f for f in os.listdir(tmp_path / "t") if "expert" in f]
    assert len(experts) == 2 * NUM_EXPERTS, experts  # one file per layer and expert
    state = torch.load(tmp_path / "t" / "layer_1_expert_3_mp_rank_00_model_states.pt")
    assert all(".deepspeed_experts.3." in name for name in state)
    # A file holds its own expert's numbers, not the storage they were cut from.
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())


def check_checkpoint_logged(rank: int, size: int, folder: str) -> None:
    logged = {"comms_logger": {"enabled": True}}
    check_checkpoint(rank, size, folder, "comet_ds", "comet_ds", 1, **logged)


def test_checkpoint_with_comms_logger(world, tmp_path: Path) -> None:
    """DeepSpeed's logger ends a process that exchanges objects through DeepSpeed."""
    world(2).run(check_checkpoint_logged, str(tmp_path))


def check_resharding(rank: int, size: int, folder: str) -> None:
    """Weights saved with ep_size 2 load with ep_size 1."""
    engine = build_engine("comet_ds", config(size), ep_size=2, k=2)
    train(engine, rank, 3)
    engine.save_checkpoint(folder, tag="t")
    x, target = next(batches(0, 1))
    other = build_engine("comet_ds", config(size), ep_size=1, k=2)
    other.load_checkpoint(folder, tag="t", load_module_only=True)
    losses = []
    for trained in (engine, other):
        trained.eval()
        torch.manual_seed(0)
        losses.append(trained(x, target).item())
    assert_close(*map(torch.tensor, losses), "loss")


def test_checkpoint_loads_with_another_ep_size(world, tmp_path: Path) -> None:
    world(2).run(check_resharding, str(tmp_path))


def check_pipeline(rank: int, size: int) -> float:
    """Two stages of two ranks, an MoE layer in each; return the curves' distance."""

    def run(kind: str, disturbance: int = 0) -> Curve:
        torch.manual_seed(0)
        moe = [PipeMoE(kind, rank) for _ in range(2)]
        layers = [nn.Linear(HIDDEN, HIDDEN), *moe, nn.Linear(HIDDEN, HIDDEN)]
        model = PipelineModule(
            layers=layers,
            num_stages=2,
            loss_fn=nn.functional.mse_loss,
            partition_method="uniform",
            activation_checkpoint_interval=0,
        )
        settings = config(2, gradient_accumulation_steps=2, **zero(1))
        settings["train_micro_batch_size_per_gpu"] = 2
        engine = comet_ds.initialize(model=model, config=settings)[0]
        torch.manual_seed(5)
        data = iter(list(batches(rank % 2, 40, disturbance=disturbance)))
        curve = [engine.train_batch(data_iter=data).item() for _ in range(20)]
        engine.destroy()
        return curve

    disturbed = functools.partial(run, "deepspeed")
    return curve_error(run("comet_ds"), run("deepspeed"), disturbed, torch.float32, "pipeline")


def test_pipeline_module(world) -> None:
    assert max(world(4).run(check_pipeline)) <= CURVE_NOISE


# ---- initialize --------------------------------------------------------------------------------


def check_initialize(rank: int, size: int, folder: str) -> None:
    block = {"path": "reference", "num_chunks": 3}
    engine = build_engine("comet_ds", config(size, comet_ds=block), ep_size=2)
    assert [m.deepspeed_moe.path for m in engine.module.moe] == ["reference"] * 2
    train(engine, rank, 1)
    # Under plain deepspeed.initialize too.
    torch.manual_seed(0)
    model = nn.Sequential(CLASSES["comet_ds"](HIDDEN, sequential(HIDDEN, FFN), 4, ep_size=2))
    deepspeed.initialize(model=model, config=config(size, comet_ds=block))
    assert model[0].deepspeed_moe.path == "reference"


def test_initialize_applies_the_block(world, tmp_path: Path) -> None:
    world(2).run(check_initialize, str(tmp_path))
