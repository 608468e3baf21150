# SPDX-License-Identifier: Apache-2.0
"""Training through DeepSpeed's engine: the same curves as with its layer, checkpoints both ways."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from experts_zoo import randomize, sequential
from tolerance import LOSS_CURVE
from torch import nn
from training import CLASSES, FFN, HIDDEN, NUM_EXPERTS, batches, build_engine, config, train

import comet_ds

STEPS = 50
CLIP = {"gradient_clipping": 0.1}
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


def check_curve(rank: int, size: int, settings: dict, options: dict, dtype: torch.dtype) -> float:
    """Return the largest difference between the two loss curves, relative to the loss.

    In half precision a rounding flips a route now and then: windows of 10 steps are compared.
    """
    curves = {}
    for kind in CLASSES:
        extra = {} if kind == "deepspeed" else {"comet_ds": {"num_chunks": 2}}
        engine = build_engine(kind, config(size, **settings, **extra), **options)
        curves[kind] = train(engine, rank, STEPS, dtype)
        engine.destroy()
    theirs, ours = (torch.tensor(curves[kind]) for kind in ("deepspeed", "comet_ds"))
    assert theirs[-5:].mean() < 0.8 * theirs[:5].mean(), "the reference run does not learn"
    if dtype != torch.float32:
        theirs, ours = (curve.view(-1, 10).mean(dim=1) for curve in (theirs, ours))
    return ((ours - theirs).abs() / theirs.abs()).max().item()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_fp32_loss_curves(world, stage: int, k: int) -> None:
    difference = max(world(2).run(check_curve, zero(stage), {"ep_size": 2, "k": k}, torch.float32))
    print(f"ZeRO {stage}, k={k}: largest relative difference over {STEPS} steps {difference:.1e}")
    assert difference <= LOSS_CURVE


# The difference allowed is what rounding makes of it in 50 steps: the dtype's epsilon, roughly.
ENGINES = {
    "replicas and parallel experts": (4, zero(1), {"ep_size": 2, "k": 2}, torch.float32, 1e-5),
    "ep_size 1": (2, zero(2), {"ep_size": 1, "k": 2}, torch.float32, 1e-5),
    "clipping": (2, {**zero(1), **CLIP}, {"ep_size": 2, "k": 1}, torch.float32, 1e-5),
    "accumulation": (
        2,
        {**zero(2), "gradient_accumulation_steps": 3},
        {"ep_size": 2, "k": 2},
        torch.float32,
        1e-5,
    ),
    "optimizer offload": (2, OFFLOAD, {"ep_size": 2, "k": 2}, torch.float32, 1e-5),
    "overlap_comm": (2, zero(2, overlap_comm=True), {"ep_size": 2, "k": 2}, torch.float32, 1e-5),
    "comms_logger": (
        2,
        {**zero(1), "comms_logger": {"enabled": True}},
        {"ep_size": 2, "k": 2},
        torch.float32,
        1e-5,
    ),
    "checkpointing": (
        2,
        zero(1),
        {"ep_size": 2, "k": 2, "checkpointing": True},
        torch.float32,
        1e-5,
    ),
    "jitter, residual": (
        2,
        zero(1),
        {"ep_size": 2, "k": 2, "noisy_gate_policy": "Jitter", "use_residual": True},
        torch.float32,
        1e-5,
    ),
    "no dropping": (2, zero(1), {"ep_size": 2, "drop_tokens": False}, torch.float32, 1e-5),
    "bf16, ZeRO 1": (2, {**zero(1), **BF16}, {"ep_size": 2, "k": 2}, torch.bfloat16, 2e-2),
    "bf16, ZeRO 2": (2, {**zero(2), **BF16}, {"ep_size": 2, "k": 1}, torch.bfloat16, 2e-2),
}


@pytest.mark.parametrize("name", ENGINES)
def test_engine_settings(world, name: str) -> None:
    size, settings, options, dtype, limit = ENGINES[name]
    assert max(world(size).run(check_curve, settings, options, dtype)) <= limit


# ---- checkpoints -------------------------------------------------------------------------------


def check_checkpoint(rank: int, size: int, folder: str, first: str, then: str, stage: int) -> None:
    """Train with one layer, save; load with the other, and go on as if nothing had happened."""
    options, settings = {"ep_size": size, "k": 2}, config(size, **zero(stage))
    engine = build_engine(first, settings, **options)
    train(engine, rank, 5)
    engine.save_checkpoint(folder, tag="t")
    expected = train(engine, rank, 5)
    engine.destroy()
    torch.manual_seed(99)
    other = build_engine(then, settings, **options)
    with torch.no_grad():
        for param in other.module.parameters():
            param.add_(1.0)  # the file must restore every one
    path, _ = other.load_checkpoint(folder, tag="t")
    assert path is not None
    got = train(other, rank, 5)
    difference = max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))
    assert difference <= LOSS_CURVE, f"{first} -> {then}: {difference:.1e}"
    other.destroy()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    ("first", "then"),
    [("deepspeed", "comet_ds"), ("comet_ds", "deepspeed"), ("comet_ds", "comet_ds")],
)
def test_checkpoints(world, tmp_path: Path, first: str, then: str, stage: int) -> None:
    world(2).run(check_checkpoint, str(tmp_path), first, then, stage)
    experts = [f for f in os.listdir(tmp_path / "t") if "expert" in f]
    assert len(experts) == 2 * NUM_EXPERTS, experts  # one file per layer and expert
    state = torch.load(tmp_path / "t" / "layer_1_expert_3_mp_rank_00_model_states.pt")
    assert all(".deepspeed_experts.3." in name for name in state)
    # A file holds its own expert's numbers, not the storage they were cut from.
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())


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
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]


def test_checkpoint_loads_with_another_ep_size(world, tmp_path: Path) -> None:
    world(2).run(check_resharding, str(tmp_path))


# ---- pipeline ----------------------------------------------------------------------------------


class PipeMoE(nn.Module):
    """A pipeline layer: one tensor in, one out.

    The experts start different: as copies, and without l_aux in the loss, the gate's gradient would
    be rounding noise, which Adam makes as large as any other.
    """

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__()
        self.moe = CLASSES[kind](
            HIDDEN, sequential(HIDDEN, FFN), num_experts=NUM_EXPERTS, ep_size=2, k=2
        )
        for i, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
            randomize(expert, seed=rank % 2 * self.moe.num_local_experts + i)

    def forward(self, x):
        return x + self.moe(x)[0]


def check_pipeline(rank: int, size: int) -> None:
    """Two stages of two ranks, an MoE layer in each."""
    curves = []
    for kind in CLASSES:
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
        data = iter(list(batches(rank % 2, 40)))
        curves.append([engine.train_batch(data_iter=data).item() for _ in range(20)])
        engine.destroy()
    theirs, ours = (torch.tensor(c) for c in curves)
    assert theirs[-1] < theirs[0]
    assert ((ours - theirs).abs() / theirs).max() <= LOSS_CURVE


def test_pipeline_module(world) -> None:
    world(4).run(check_pipeline)


# ---- initialize --------------------------------------------------------------------------------


def check_initialize(rank: int, size: int, folder: str) -> None:
    block = {"path": "reference", "num_chunks": 3}
    engine = build_engine("comet_ds", config(size, comet_ds=block), ep_size=2)
    assert [m.deepspeed_moe.path for m in engine.module.moe] == ["reference"] * 2
    train(engine, rank, 1)
    # Plain deepspeed.initialize ignores the block.
    torch.manual_seed(0)
    model = nn.Sequential(CLASSES["comet_ds"](HIDDEN, sequential(HIDDEN, FFN), 4, ep_size=2))
    deepspeed.initialize(model=model, config=config(size, comet_ds=block))
    assert model[0].deepspeed_moe.path == "pipelined"


def test_initialize_applies_the_block(world, tmp_path: Path) -> None:
    world(2).run(check_initialize, str(tmp_path))
