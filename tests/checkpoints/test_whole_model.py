# SPDX-License-Identifier: Apache-2.0
"""The whole model, with the experts of all ranks: consolidated, loaded, saved by the engine."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from helpers.checkpointing import (
    BRAIN,
    EP1,
    EP2,
    EP4,
    FP16,
    FP32_SUMS,
    FUSED_ADAM,
    HALF,
    SPLIT,
    STEPS,
    TIED2,
    assert_same,
    build,
    machine,
    save_weights,
)
from helpers.experts_zoo import sequential
from helpers.training import BF16, CLASSES, HIDDEN, NUM_EXPERTS, Model, config, train, zero
from torch import Tensor, nn

import comet_ds
from comet_ds.__main__ import main
from comet_ds.checkpoints import names
from comet_ds.checkpoints.consolidate import DTYPES, consolidate
from comet_ds.checkpoints.files import MODEL_FILE, Checkpoint
from comet_ds.checkpoints.reshard import reshard


def wide(layer: int) -> nn.Module:
    return sequential(HIDDEN, 2**17)


# ---- one file ----------------------------------------------------------------------------------

# Settings and options of the run that saves, and what else.
CONSOLIDATE: dict[str, tuple] = {
    "ZeRO 0": (zero(0), EP2, {}),
    "ZeRO 0, frozen": (zero(0), EP2, {"freeze": True}),
    "ZeRO 0, bf16": ({**zero(0), **BF16}, EP2, BRAIN),
    "ZeRO 0, bf16, FusedAdam": ({**zero(0), **BF16, **FUSED_ADAM}, EP2, BRAIN),
    "ZeRO 0, fp16, split": ({**zero(0), **FP16}, EP1, HALF | SPLIT),
    "ZeRO 0, bf16, tied": ({**zero(0), **BF16}, TIED2, BRAIN),
    "ZeRO 1": (zero(1), EP2, {}),
    "ZeRO 1, fp16": ({**zero(1), **FP16}, EP2, HALF),
    "ZeRO 2, bf16, round robin": (
        {**zero(2, round_robin_gradients=True), **BF16},
        EP1,
        BRAIN,
    ),
    "ZeRO 2, bf16, frozen": ({**zero(2), **BF16}, EP2, BRAIN | {"freeze": True}),
    "ZeRO 2, bf16, tied": ({**zero(2), **BF16}, TIED2, BRAIN),
    "BF16_Optimizer": ({**zero(1), **BF16, **FP32_SUMS}, EP2, BRAIN),
}


def in_one(by_rank: list[dict[str, Tensor]], num_local: int) -> dict[str, Tensor]:
    """Return the whole model's tensors from those of an expert parallel group's ranks."""
    return {
        names.renumber(name, rank * num_local): tensor.float()
        for rank, weights in enumerate(by_rank)
        for name, tensor in weights.items()
        if rank == 0 or names.parse(name)
    }


@pytest.mark.parametrize("name", CONSOLIDATE)
def test_consolidate(world, tmp_path: Path, name: str) -> None:
    """Every fp32 weight is the optimizer's, bit for bit, and so it is after resharding."""
    settings, options, more = CONSOLIDATE[name]
    args = str(tmp_path), settings, options
    found = world(2).run(functools.partial(save_weights, **more), *args)
    ep_size = options["ep_size"]
    expected = in_one(found[:ep_size], NUM_EXPERTS // ep_size)
    torch.manual_seed(0)
    whole = Model(CLASSES["deepspeed"], **{**options, "ep_size": 1})
    with machine(more.get("limit"), torch.float32):
        reshard(Checkpoint.open(tmp_path), tmp_path / "other", ep_size=4 // ep_size, num_ranks=4)
        for folder in (tmp_path, tmp_path / "other"):
            for kind in ("fp32", "bf16"):
                path = folder / f"{kind}.pt"
                consolidate(Checkpoint.open(folder), path, dtype=kind)
                got = torch.load(path)
                assert list(got) == list(whole.state_dict())
                for key, tensor in got.items():
                    assert tensor.dtype == DTYPES[kind]
                    source = key if key in expected else key.replace("down.", "up.")
                    wanted = expected[source].to(tensor.dtype)
                    assert torch.equal(tensor, wanted), f"{folder}: {key} in {kind}"
    whole.load_state_dict(torch.load(tmp_path / "fp32.pt"))


def test_what_deepspeed_leaves_out_is_the_optimizers(world, tmp_path: Path) -> None:
    """The MLP of a residual layer whose path has "expert" in it is in no model file."""
    options = {**EP2, "use_residual": True}
    found = world(2).run(save_weights, str(tmp_path), zero(2), options)
    path = tmp_path / "saved" / MODEL_FILE
    state = torch.load(path, weights_only=False)
    lost = [name for name in state["module"] if name.startswith(("moe.1.mlp", "moe.1.coeff"))]
    state["module"] = {n: t for n, t in state["module"].items() if n not in lost}
    torch.save(state, path)
    assert len(lost) == 6
    expected = in_one(found, 2)
    for folder in (tmp_path, tmp_path / "other"):
        got = torch.load(consolidate(Checkpoint.open(folder), folder / "whole.pt"))
        assert_same(dict(sorted(expected.items())), dict(sorted(got.items())), str(folder))
        if folder == tmp_path:
            reshard(Checkpoint.open(folder), folder / "other", ep_size=4, num_ranks=4)


def test_safetensors(world, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    settings = {**zero(1), **BF16}
    world(2).run(functools.partial(save_weights, **BRAIN), str(tmp_path), settings, EP2)
    for kind in ("fp32", "bf16"):
        paths = [str(tmp_path / f"{kind}{suffix}") for suffix in (".pt", ".safetensors")]
        for path in paths:
            main(["checkpoint", "consolidate", str(tmp_path), path, "--dtype", kind])
        whole, other = torch.load(paths[0]), safetensors.load_file(paths[1])
        assert_same(dict(sorted(whole.items())), dict(sorted(other.items())), kind)


WRITER = """
import sys
from pathlib import Path
import comet_ds.checkpoints.consolidate as module
from comet_ds.checkpoints.files import Checkpoint

def used():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def watched(self, name):
    value = read(self, name)
    most.append(used())
    return value

read, most, start = module.Weights.read, [], used()
module.Weights.read = watched
module.consolidate(Checkpoint.open(sys.argv[1]), sys.argv[2])
print(max(most) - start)
"""


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_consolidate_needs_memory_for_one_parameter(world, tmp_path: Path, suffix: str) -> None:
    """Of 16 matrices, 8 MiB each."""
    options = {**EP1, "expert": wide}
    world(1).run(save_weights, str(tmp_path), zero(1), options)
    path = tmp_path / f"whole.{suffix}"
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(path)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert path.stat().st_size > 128 * 2**20
    needed = float(done.stdout.split()[-1])
    print(f"{suffix}: {needed:.1f} MiB")
    assert needed < 40, "MiB of memory that is no file's"


# ---- the whole model's state_dict at ep_size above 1 -------------------------------------------


def check_load(rank: int, size: int, folder: str, stack: bool) -> None:
    whole = torch.load(f"{folder}/model.pt")
    options = {"k": 2, "comet_ds": {"stack_experts": stack}}
    for ep_size in (1, 2, 4):
        model = Model(comet_ds.MoE, ep_size=ep_size, **options)
        model.load_state_dict(whole)  # before its groups exist
        num_local = NUM_EXPERTS // ep_size
        offset = rank % ep_size * num_local
        own = {names.renumber(n, offset): t for n, t in model.state_dict().items()}
        assert own.keys() <= whole.keys() and len(own) == 8 + 8 * num_local - 2
        assert_same({n: whole[n] for n in own}, own, f"ep_size {ep_size}")
        engine = deepspeed.initialize(model=model, config=config(size, **zero(1)))[0]
        with torch.no_grad():
            for param in engine.module.parameters():
                param.zero_()
        for prefix in ("", "wrapped."):
            holder = engine.module
            for name in prefix.split(".")[:-1]:
                holder = torch.nn.ModuleDict({name: holder})
            holder.load_state_dict({prefix + n: t for n, t in whole.items()})
        again = {names.renumber(n, offset): t for n, t in engine.module.state_dict().items()}
        assert_same(own, again, f"ep_size {ep_size}, engine")
        layer, path = engine.module.moe[1], "moe.1."
        part = {n.removeprefix(path): t for n, t in whole.items() if n.startswith(path)}
        assert not any(layer.load_state_dict(part))
        if num_local in (1, 2):
            local = engine.module.state_dict()
            assert not any(engine.module.load_state_dict(local))  # a rank's own stays possible
            assert_same(own, {names.renumber(n, offset): t for n, t in local.items()}, "own")
        engine.destroy()


@pytest.mark.parametrize("stack", [True, False])
def test_each_rank_loads_its_own_experts(world, tmp_path: Path, stack: bool) -> None:
    torch.manual_seed(3)
    whole = Model(CLASSES["deepspeed"], ep_size=1, k=2).state_dict()
    torch.save({name: torch.randn_like(tensor) for name, tensor in whole.items()},
               tmp_path / "model.pt")  # fmt: skip
    world(4).run(check_load, str(tmp_path), stack)


def check_refused_states(rank: int, size: int) -> None:
    model = Model(comet_ds.MoE, ep_size=2, k=2)
    whole = Model(comet_ds.MoE, ep_size=1, k=2).state_dict()
    for wanted in ((0, 1, 2), (2, 3)):
        part = {n: t for n, t in whole.items() if not (p := names.parse(n)) or p.expert in wanted}
        with pytest.raises(RuntimeError, match=rf"all 4 experts.*got experts \[{wanted[0]}, "):
            model.load_state_dict(part)
    model.load_state_dict(whole)
    with pytest.raises(ValueError, match=r"load the state_dict after deepspeed\.initialize"):
        deepspeed.initialize(
            model=model, config=config(size, use_data_before_expert_parallelism=True, **zero(1))
        )


def test_a_state_dict_that_is_nobodys_is_refused(world) -> None:
    world(4).run(check_refused_states)


def test_ranks_must_be_known() -> None:
    model, whole = Model(comet_ds.MoE, ep_size=2), Model(comet_ds.MoE).state_dict()
    with pytest.raises(RuntimeError, match=r"deepspeed\.init_distributed\(\)"):
        model.load_state_dict(whole)


def check_16bit(rank: int, size: int, folder: str) -> None:
    settings = {**zero(1), **BF16}
    for options in (EP1, EP2, EP4):
        kind = {**options, "comet_ds": {"stack_experts": options is not EP2}}
        engine = build("comet_ds", size, settings, kind)
        train(engine, rank, STEPS, torch.bfloat16)
        tag = str(options["ep_size"])
        engine.save_checkpoint(folder, tag=tag)
        assert engine.save_16bit_model(f"{folder}/{tag}")
        engine.destroy()
    if rank == 0:
        for tag in ("1", "2", "4"):
            consolidate(Checkpoint.open(folder, tag), f"{folder}/{tag}.pt", dtype="bf16")
            found = torch.load(f"{folder}/{tag}/pytorch_model.bin")
            assert_same(torch.load(f"{folder}/{tag}.pt"), dict(found), tag)


def test_save_16bit_model_has_all_experts(world, tmp_path: Path) -> None:
    """The same file as the checkpoint's, names in the same order."""
    world(4).run(check_16bit, str(tmp_path))
