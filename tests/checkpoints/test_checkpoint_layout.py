# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of stacked experts: DeepSpeed's files bit for bit, refused where they do not fit.

``test_files`` is the main one. For each way to train it has DeepSpeed's layer write a checkpoint
('theirs'), read it and write it again ('again'), and comet_ds read it and write it ('ours'). 'ours'
and 'again' must have the same content; and whoever resumes from either must get the losses of the
run that was never interrupted.
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
from checkpointing import (
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
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from deepspeed.pipe import PipelineModule
from experts_zoo import TiedMLP, randomize
from tolerance import assert_few_steps
from torch import nn
from torch.distributed import TCPStore
from training import BF16, CLASSES, HIDDEN, OFFLOAD, Model, PipeMoE, batches, config, train, zero

from comet_ds.checkpoints.flat_groups import flatten, plan_moves, run_moves
from comet_ds.checkpoints.layout import NativeParameter, ParameterTable, find_clusters
from comet_ds.experts.stacked import StackedExperts
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


# ---- a process without comet_ds ----------------------------------------------------------------

STOCK = """
import sys, types
import deepspeed, torch
from deepspeed.moe.layer import MoE
stub = types.ModuleType("comet_ds")  # what tests/training.py needs of it: DeepSpeed's own
stub.MoE, stub.initialize = MoE, deepspeed.initialize
sys.modules["comet_ds"] = stub
import training
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


# ---- refused -----------------------------------------------------------------------------------


def forge_stacks(rank: int, folder: str) -> None:
    """Make the file one with stacks, as a naive implementation would write."""
    if rank == 0:
        path = f"{folder}/t/mp_rank_00_model_states.pt"
        state = torch.load(path, weights_only=False)
        group = state["param_shapes"][1]
        name = "moe.0.deepspeed_moe.experts.deepspeed_experts.0.0.weight"
        made = {n.replace(".0.0.weight", "_0_stacked.weight"): s for n, s in group.items()}
        assert name in group and name not in made
        state["param_shapes"][1] = made
        torch.save(state, path)


def forge_stacked_states(rank: int, folder: str) -> None:
    path = f"{folder}/t/expp_rank_{rank}_mp_rank_00_optim_states.pt"
    state = torch.load(path, weights_only=False)
    for group in state["optimizer"]["param_groups"][1:]:
        group["params"] = group["params"][::2]
    torch.save(state, path)


def forge_world_size(rank: int, folder: str) -> None:
    if rank == 0:
        path = f"{folder}/t/mp_rank_00_model_states.pt"
        torch.save({**torch.load(path, weights_only=False), "dp_world_size": 4}, path)


ELASTIC = zero(1, elastic_checkpoint=True)
ROUND_ROBIN = zero(1, round_robin_gradients=True)
# Kind of layer and settings of the run that saves, of the one that loads, what is done to the
# file between, and what is said.
REFUSED: dict[str, tuple] = {
    "ep_size, ZeRO 0": (zero(0), EP2, zero(0), EP1, {}, None, "parameters, expected"),
    "ep_size, ZeRO 0, to more": (zero(0), EP1, zero(0), EP2, {}, None, "ep_size"),
    "ep_size, ZeRO 1": (zero(1), EP2, zero(1), EP1, {}, None, "ep_size was different"),
    "ep_size, ZeRO 2, to more": (zero(2), EP1, zero(2), EP2, {}, None, "ep_size was different"),
    "number of ranks": (zero(1), EP2, zero(1), EP2, {}, forge_world_size, "4 data parallel ranks"),
    "round robin": (zero(1), EP1, ROUND_ROBIN, EP1, {}, None, "round_robin_gradients"),
    "ZeRO stage": (zero(0), EP2, zero(1), EP2, {}, None, "ZeRO stage was different"),
    "elastic": (ELASTIC, EP2, zero(1), EP2, {}, None, "elastic_checkpoint"),
    "group limit": (zero(1), EP2, zero(1), EP2, SPLIT, None, "groups of parameters, expected"),
    "stacks, ZeRO 1": (zero(1), EP2, zero(1), EP2, {}, forge_stacks, "stacks of experts"),
    "stacks, ZeRO 0": (zero(0), EP2, zero(0), EP2, {}, forge_stacked_states, "expected"),
}
if HAS_ALIGNMENT:
    aligned = zero(1, parameter_alignment=True)
    REFUSED["alignment"] = (zero(1), ODD, aligned, ODD, {}, None, "parameter_alignment")


def check_refused(
    rank: int,
    size: int,
    folder: str,
    saved: tuple[dict, dict],
    loaded: tuple[dict, dict],
    limit: int | None,
    forge: Any,
    message: str,
) -> None:
    with machine(limit, torch.float32):
        engine = build("deepspeed", size, *saved)
        train(engine, rank, STEPS)
        engine.save_checkpoint(folder, tag="t")
        engine.destroy()
    if forge:
        forge(rank, folder)
    torch.distributed.barrier()
    engine = build("comet_ds", size, *loaded)
    before = copy.deepcopy(engine.module.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        engine.load_checkpoint(folder, tag="t")
    assert "load_module_only=True" in str(error.value)
    assert_same(before, engine.module.state_dict(), "weights")
    engine.load_checkpoint(folder, tag="t", load_module_only=True)
    assert not torch.equal(before["first.weight"], engine.module.first.weight)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_a_weight_is_loaded(
    world, tmp_path: Path, name: str
) -> None:
    settings, options, *loaded, more, forge, message = REFUSED[name]
    args = str(tmp_path), (settings, options), tuple(loaded), more.get("limit"), forge, message
    world(2).run(check_refused, *args)


# ---- what else is in the files -----------------------------------------------------------------


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


# ---- layouts by hand ---------------------------------------------------------------------------


def natives(**sizes: int) -> list[list[NativeParameter]]:
    made = {name: torch.empty(size) for name, size in sizes.items()}
    return [[NativeParameter(name, t.shape, t, None)] for name, t in made.items()]


def test_flat_group() -> None:
    group = flatten(natives(a=4, b=2, c=3), 2, end_alignment=4)
    assert (group.offsets, group.size, group.partition_size) == ([0, 4, 6], 12, 6)
    assert group.fragments(0) == [("a", 0, 4, 0), ("b", 0, 2, 4)]
    assert group.fragments(1) == [("c", 0, 3, 0)]
    assert [group.padding_of(rank) for rank in range(2)] == [0, 3]
    group = flatten(natives(a=4, b=2, c=3), 2, alignment=8, end_alignment=4, is_round_robin=True)
    assert [param[0].name for param in group.params] == ["a", "c", "b"]
    assert (group.offsets, group.paddings, group.size) == ([0, 8, 16], [4, 5, 0], 20)
    assert group.fragments(0) == [("a", 0, 4, 0), ("c", 0, 2, 8)]
    assert group.fragments(1) == [("c", 2, 1, 0), ("b", 0, 2, 6)]
    assert group.whole_fragments(1) == [("c", 0, 3, 0), ("b", 0, 2, 3)]
    assert {k: vars(v) for k, v in group.slice_mapping(1).items()} == {
        "b": {"numel": 2, "start": 6},
        "c": {"numel": 1, "start": 0},
    }


def test_moves() -> None:
    """Two experts of a (3 elements) and b (2): from a0 a1 b0 b1 to a0 b0 a1 b1."""
    a0, a1, b0, b1 = natives(a0=3, a1=3, b0=2, b1=2)
    source, target = flatten([a0 + a1, b0 + b1], 1), flatten([a0, b0, a1, b1], 1)
    moves = plan_moves([[source.fragments(0)]], [[target.fragments(0)]])
    found = run_moves(moves, [torch.arange(10)], [10], torch.int64, None)
    assert found[0].tolist() == [0, 1, 2, 6, 7, 3, 4, 5, 8, 9]


@pytest.mark.parametrize("limit", [100, 600, 700, 1100, 2000, 5000, 10**9])
@pytest.mark.parametrize("is_given_groups", [False, True])
def test_groups_are_those_of_deepspeeds_layer(limit: int, is_given_groups: bool) -> None:
    """Also where weights and biases are in groups of their own."""
    found = {}
    with machine(limit, torch.float32):
        for kind, cls in CLASSES.items():
            torch.manual_seed(0)
            model = Model(cls)
            names = {param: name for name, param in model.named_parameters()}
            groups = [{"name": "all", "params": list(model.parameters()), "lr": 1}]
            if is_given_groups:
                parts = [[p for p in model.parameters() if (p.dim() > 1) == m] for m in (0, 1)]
                groups = [{"name": str(m), "params": p, "lr": m} for m, p in enumerate(parts)]
            groups = [group for group in split(groups) if group["params"]]
            table = ParameterTable(model, names)
            clusters = find_clusters(groups, table)
            found[kind] = [[n.name for n in group] for c in clusters for group in c.native]
            if kind == "deepspeed":
                assert found[kind] == [[names[p] for p in g["params"]] for g in groups]
    assert found["comet_ds"] == found["deepspeed"]


def test_order_with_parameters_beside_the_stacks() -> None:
    """As LoRA adds them: an expert's parameters keep their order."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 3), nn.Linear(3, 4)

    def orders(stack: bool) -> list[str]:
        layer = StackedExperts(Adapted(), 2, "ep_size_1", stack=stack)
        for expert in layer.deepspeed_experts:
            expert.fc1.register_module("lora", nn.Linear(4, 2, bias=False))
        names = {param: name for name, param in layer.named_parameters()}
        return [n.name for n in ParameterTable(layer, names).expand(layer.parameters())]

    assert orders(True) == orders(False)
    assert len(orders(True)) == 10
