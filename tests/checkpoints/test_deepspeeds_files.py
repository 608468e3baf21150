# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of stacked experts are DeepSpeed's files, bit for bit.

``test_files`` is the main one. For each way to train it has DeepSpeed's layer write a checkpoint
('theirs'), read it and write it again ('again'), and comet_ds read it and write it ('ours'). 'ours'
and 'again' must have the same content, and whoever resumes from either must get the losses of the
run that was never interrupted, also a process that does not know comet_ds.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import PipelineModule
from helpers.checkpointing import (
    BRAIN,
    EP1,
    EP2,
    EP4,
    FP16,
    FP32_SUMS,
    FUSED_ADAM,
    HALF,
    HAS_ALIGNMENT,
    MUON,
    SGD,
    SPLIT,
    STEPS,
    assert_same,
    assert_same_files,
    build,
    load,
    machine,
    uneven,
)
from helpers.experts_zoo import TiedMLP, randomize
from helpers.tolerance import assert_few_steps
from helpers.training import (
    BF16,
    CLASSES,
    HIDDEN,
    OFFLOAD,
    PipeMoE,
    batches,
    config,
    train,
    zero,
)
from torch import nn
from torch.distributed import TCPStore

from comet_ds.zero.optimizer_choice import stacked_experts

ODD = {**EP1, "expert": functools.partial(uneven, less=1)}  # to be aligned


def check_files(
    rank: int, size: int, folder: str, settings: dict, options: dict, **more: Any
) -> None:
    """Save and load in all directions."""
    dtype, limit = more.pop("dtype", torch.float32), more.pop("limit", None)
    make = functools.partial(build, size=size, settings=settings, options=options, **more)
    with machine(limit, dtype):
        engine = make("deepspeed")
        train(engine, rank, STEPS, dtype)
        engine.save_checkpoint(folder, tag="theirs")
        expected = train(engine, rank, STEPS, dtype)
        engine.destroy()
        curves = {}
        for kind, tag, saved in (
            ("deepspeed", "theirs", "again"),
            ("comet_ds", "theirs", "ours"),
            ("deepspeed", "ours", None),
            ("comet_ds", "ours", "ours again"),
            ("unstacked", "ours", None),
        ):
            engine = load(make(kind), folder, tag)
            if saved:
                engine.save_checkpoint(folder, tag=saved)
            curves[kind, tag] = train(engine, rank, STEPS, dtype)
            if len(curves) == 1:
                engine.load_checkpoint(folder, tag=tag)
                noisy = train(engine, rank, STEPS, dtype, disturbance=1)
            engine.destroy()
        engine = make("comet_ds")
        assert stacked_experts(engine.module)
        train(engine, rank, STEPS, dtype)
        engine.save_checkpoint(folder, tag="fresh")
        engine.destroy()
    torch.distributed.barrier()
    if rank == 0:
        assert_same_files(folder, "again", "ours")
        assert_same_files(folder, "ours", "ours again")
        assert_same_files(folder, "theirs", "fresh", values=False)
    for (kind, tag), curve in curves.items():
        assert_few_steps(curve, expected, noisy, f"{tag} -> {kind}")


FILES: dict[str, tuple] = {
    "ZeRO 0": (2, zero(0), EP2, {}),
    "ZeRO 0, FusedAdam": (2, {**zero(0), **FUSED_ADAM}, EP2, {}),
    "ZeRO 0, groups split": (2, zero(0), EP2, SPLIT),
    "ZeRO 0, Adagrad": (2, {**zero(0), "optimizer": {"type": "Adagrad"}}, EP2, {}),
    "ZeRO 0, bf16": (2, {**zero(0), **BF16}, EP2, BRAIN),
    "ZeRO 0, bf16, FusedAdam": (2, {**zero(0), **BF16, **FUSED_ADAM}, EP2, BRAIN),
    "ZeRO 0, fp16": (2, {**zero(0), **FP16}, EP2, HALF),
    "ZeRO 0, fp16, FusedAdam, split": (2, {**zero(0), **FP16, **FUSED_ADAM}, EP2, HALF | SPLIT),
    "ZeRO 1": (2, zero(1), EP2, {}),
    "ZeRO 1, replicas": (2, zero(1), EP1, {}),
    "ZeRO 1, replicas, logger": (2, {**zero(1), "comms_logger": {"enabled": True}}, EP1, {}),
    "ZeRO 1, one local expert": (4, zero(1), EP4, {}),
    "ZeRO 1, replicas of parallel experts": (4, zero(1), EP2, {}),
    "ZeRO 1, bf16": (2, {**zero(1), **BF16}, EP2, BRAIN),
    "ZeRO 1, fp16": (2, {**zero(1), **FP16}, EP2, HALF),
    "ZeRO 1, SGD": (2, {**zero(1), **SGD}, EP1, {}),
    "ZeRO 1, frozen, split": (2, zero(1), EP1, {"freeze": True} | SPLIT),
    "ZeRO 2": (2, zero(2), EP2, {}),
    "ZeRO 2, replicas": (2, zero(2), EP1, {}),
    "ZeRO 2, replicas of parallel experts": (4, zero(2), EP2, {}),
    "ZeRO 2, bf16": (2, {**zero(2), **BF16}, EP2, BRAIN),
    "ZeRO 2, split, replicas": (2, zero(2), EP1, SPLIT),
    "ZeRO 2, round robin": (2, zero(2, round_robin_gradients=True), EP1, {}),
    "ZeRO 2, frozen": (2, zero(2), EP2, {"freeze": True}),
    "ZeRO 2, frozen, replicas": (2, zero(2), EP1, {"freeze": True}),
    "ZeRO 2, residual": (2, zero(2), {**EP2, "use_residual": True}, {}),
    "ZeRO 2, offload": (2, OFFLOAD, EP1, {}),
    "ZeRO 2, Muon, replicas": (2, {**zero(2), **MUON}, EP1, {}),
    "BF16_Optimizer": (2, {**zero(1), **BF16, **FP32_SUMS}, EP2, BRAIN),
    "BF16_Optimizer, replicas": (2, {**zero(1), **BF16, **FP32_SUMS}, EP1, BRAIN),
}

if HAS_ALIGNMENT:
    both = {"parameter_alignment": True, "round_robin_gradients": True}
    FILES["ZeRO 2, alignment"] = (2, zero(2, parameter_alignment=True), ODD, {})
    FILES["ZeRO 2, alignment, round robin, split"] = (2, zero(2, **both), ODD, SPLIT)


@pytest.mark.parametrize("name", FILES)
def test_files(world, tmp_path: Path, name: str) -> None:
    size, settings, options, more = FILES[name]
    check = functools.partial(check_files, **more)
    world(size).run(check, str(tmp_path), settings, options)


def check_old_files(rank: int, size: int, folder: str) -> None:
    """A file of DeepSpeed 0.19.6 does not say how parameters are aligned: they are not."""
    engine = build("deepspeed", size, zero(1), ODD)
    train(engine, rank, STEPS)
    engine.save_checkpoint(folder, tag="theirs")
    expected = train(engine, rank, STEPS)
    engine.destroy()
    path = f"{folder}/theirs/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    del state["optimizer_state_dict"]["param_alignment_paddings"]
    torch.save(state, path)
    torch.distributed.barrier()
    for kind, saved in (("deepspeed", "again"), ("comet_ds", "ours")):
        engine = load(build(kind, size, zero(1, parameter_alignment=True), ODD), folder, "theirs")
        engine.save_checkpoint(folder, tag=saved)
        curve = train(engine, rank, STEPS)
        engine.load_checkpoint(folder, tag="theirs")
        noisy = train(engine, rank, STEPS, disturbance=1)
        engine.destroy()
    torch.distributed.barrier()
    assert_same_files(folder, "again", "ours")
    assert_few_steps(curve, expected, noisy, "without alignment -> with it")


@pytest.mark.skipif(not HAS_ALIGNMENT, reason="this DeepSpeed does not align parameters")
def test_files_without_alignment_load_with_it(world, tmp_path: Path) -> None:
    world(2).run(check_old_files, str(tmp_path))


STOCK = """
import sys, types
import deepspeed, torch
from deepspeed.moe.layer import MoE
stub = types.ModuleType("comet_ds")  # what helpers/training.py needs of it: DeepSpeed's own
stub.MoE, stub.initialize = MoE, deepspeed.initialize
sys.modules["comet_ds"] = stub
from helpers import training
folder, rank, size, settings, options, steps = {arguments!r}
torch.set_num_threads(1)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
engine = training.build_engine("deepspeed", training.config(size, **settings), **options)
engine.load_checkpoint(folder, tag="ours")
losses = training.train(engine, rank, steps)
assert not [name for name in sys.modules if name.startswith("comet_ds.")]
torch.save(losses, f"{{folder}}/losses_{{rank}}.pt")
"""


def check_saved(
    rank: int, size: int, folder: str, settings: dict, options: dict
) -> tuple[list[float], list[float]]:
    """Return the losses of what follows, and with noise."""
    engine = build("comet_ds", size, settings, options)
    assert stacked_experts(engine.module)
    train(engine, rank, STEPS)
    engine.save_checkpoint(folder, tag="ours")
    expected = train(engine, rank, STEPS)
    engine.load_checkpoint(folder, tag="ours")
    return expected, train(engine, rank, STEPS, disturbance=1)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_process_without_comet_ds_resumes(world, tmp_path: Path, stage: int) -> None:
    settings, options = zero(stage), {"ep_size": 2, "k": 2}  # the script gets them as text
    expected = world(2).run(check_saved, str(tmp_path), settings, options)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(2):
        arguments = (str(tmp_path), rank, 2, settings, options, STEPS)
        env = {
            **os.environ,
            **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
            **{name: "2" for name in ("WORLD_SIZE", "LOCAL_SIZE")},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "DS_ACCELERATOR": "cpu",
        }
        script = STOCK.format(arguments=arguments)
        command = [sys.executable, "-c", script]
        processes.append(subprocess.Popen(command, env=env, cwd=Path(__file__).parent.parent))
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    for rank in range(2):
        losses = torch.load(tmp_path / f"losses_{rank}.pt")
        assert_few_steps(losses, *expected[rank], f"rank {rank}")


def check_frozen(rank: int, size: int, folder: str) -> None:
    """Frozen experts differ between ranks, and DeepSpeed's fragments are rank 0's only."""
    engine = build("comet_ds", size, zero(2), EP2, freeze=True)
    for layer in engine.module.moe:
        for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            randomize(expert, seed=10 * rank + index)
    saved = copy.deepcopy(engine.module.state_dict())
    engine.optimizer.refresh_fp32_params()
    engine.save_checkpoint(folder, tag="t")
    engine.destroy()
    engine = load(build("comet_ds", size, zero(2), EP2, freeze=True), folder, "t")
    assert_same(saved, engine.module.state_dict(), "weights")


def test_frozen_experts_are_each_ranks_own(world, tmp_path: Path) -> None:
    world(2).run(check_frozen, str(tmp_path))


def check_tied(rank: int, size: int, folder: str) -> None:
    options = {**EP2, "expert": lambda layer: TiedMLP(HIDDEN)}
    for kind in CLASSES:
        engine = build(kind, size, zero(1), options)
        train(engine, rank, STEPS)
        engine.save_checkpoint(folder, tag=kind)
        engine.destroy()
    torch.distributed.barrier()
    assert_same_files(folder, "deepspeed", "comet_ds", values=False)
    path = f"{folder}/comet_ds/mp_rank_00_model_states.pt"
    assert len(torch.load(path, weights_only=False)["shared_params"]) == 4


def test_tied_parameters_have_both_names(world, tmp_path: Path) -> None:
    world(2).run(check_tied, str(tmp_path))


def check_pipeline(rank: int, size: int, folder: str) -> None:
    """Two stages of two ranks, each with a layer."""
    settings = config(2, gradient_accumulation_steps=2, **zero(1))
    settings["train_micro_batch_size_per_gpu"] = 2

    def make(kind: str) -> Any:
        torch.manual_seed(0)
        layers = [PipeMoE(kind, rank) for _ in range(2)]
        model = PipelineModule(
            layers=layers,
            num_stages=2,
            loss_fn=nn.functional.mse_loss,
            partition_method="uniform",
            activation_checkpoint_interval=0,
        )
        return deepspeed.initialize(model=model, config=settings)[0]

    def run(engine: Any, disturbance: int = 0) -> list[float]:
        torch.manual_seed(5)
        data = iter(list(batches(rank % 2, 2 * STEPS, disturbance=disturbance)))
        return [engine.train_batch(data_iter=data).item() for _ in range(STEPS)]

    engine = make("deepspeed")
    run(engine)
    engine.save_checkpoint(folder, tag="theirs")
    expected = run(engine)
    engine.destroy()
    engine = load(make("deepspeed"), folder, "theirs")
    engine.save_checkpoint(folder, tag="again")
    noisy = run(engine, disturbance=1)
    engine.destroy()
    engine = load(make("comet_ds"), folder, "theirs")
    engine.save_checkpoint(folder, tag="ours")
    torch.distributed.barrier()
    assert_same_files(folder, "again", "ours")
    assert_few_steps(run(engine), expected, noisy, "theirs -> comet_ds")


def test_pipeline_module(world, tmp_path: Path) -> None:
    world(4).run(check_pipeline, str(tmp_path))
