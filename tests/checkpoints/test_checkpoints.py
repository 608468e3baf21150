# SPDX-License-Identifier: Apache-2.0
"""``comet_ds checkpoint``: files for other ranks are those an engine of that layout writes.

``test_reshard`` is the main one. A run saves a checkpoint and goes on; the checkpoint is resharded
without an engine; engines of the other layout, with DeepSpeed's layer and with ours, load it, write
it again ('again') and go on. The losses must be those of the run that was never interrupted, the
resharded files those in 'again', and what is resharded back the checkpoint that was saved.

Ranks beyond the second repeat the batches and random draws of the first two, so that runs with
more of them compute the same gradients.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

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
    HAS_ALIGNMENT,
    MUON,
    SGD,
    SPLIT,
    STEPS,
    TIED1,
    TIED2,
    assert_same,
    assert_same_files,
    build,
    load,
    machine,
    save_weights,
)
from helpers.tolerance import assert_few_steps
from helpers.training import BF16, OFFLOAD, config, train, zero

from comet_ds.__main__ import main
from comet_ds.checkpoints.consolidate import consolidate
from comet_ds.checkpoints.files import MODEL_FILE, Checkpoint
from comet_ds.checkpoints.reshard import reshard


def by_dimension(model: Any) -> list[dict[str, Any]]:
    """Return matrices and vectors as groups of their own, as for weight decay."""
    parts = [[p for p in model.parameters() if (p.dim() > 1) == m] for m in (True, False)]
    return [
        {"name": str(m), "params": params, "weight_decay": 0.01 * (1 - m)}
        for m, params in enumerate(parts)
    ]


BY_DIMENSION = {"model_parameters": by_dimension}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}

# Ranks and options of the run that saves, of the one that resumes, settings, and what else.
RESHARD: dict[str, tuple] = {
    "ZeRO 0, to more": (2, EP1, 4, EP4, zero(0), {}),
    "ZeRO 0, to fewer": (4, EP4, 2, EP2, zero(0), {}),
    "ZeRO 0, FusedAdam": (2, EP2, 4, EP4, {**zero(0), **FUSED_ADAM}, {}),
    "ZeRO 0, split": (2, EP2, 2, EP1, zero(0), SPLIT),
    "ZeRO 0, frozen": (2, EP2, 2, EP1, zero(0), {"freeze": True}),
    "ZeRO 0, bf16": (2, EP2, 4, EP4, {**zero(0), **BF16}, BRAIN),
    "ZeRO 0, bf16, FusedAdam": (4, EP4, 2, EP1, {**zero(0), **BF16, **FUSED_ADAM}, BRAIN),
    "ZeRO 0, fp16": (4, EP2, 2, EP1, {**zero(0), **FP16}, HALF),
    "ZeRO 0, fp16, FusedAdam, split": (2, EP2, 2, EP1, {**zero(0), **FP16, **FUSED_ADAM},
                                       HALF | SPLIT),
    "ZeRO 1, other ep_size": (2, EP2, 2, EP1, zero(1), {}),
    "ZeRO 1, to more": (2, EP2, 4, EP4, zero(1), {}),
    "ZeRO 1, more ranks": (2, EP2, 4, EP2, zero(1), {}),
    "ZeRO 1, to fewer": (4, EP4, 2, EP1, zero(1), {}),
    "ZeRO 1, to one": (2, EP2, 1, EP1, zero(1), {"num_batches": 1}),
    "ZeRO 1, fp16": (2, EP2, 4, EP4, {**zero(1), **FP16}, HALF),
    "ZeRO 1, SGD": (2, EP1, 4, EP2, {**zero(1), **SGD}, {}),
    "ZeRO 1, frozen, split": (2, EP1, 4, EP4, zero(1), {"freeze": True} | SPLIT),
    "ZeRO 1, data first": (4, EP2, 2, EP1, {**zero(1), "use_data_before_expert_parallelism": True},
                           {}),
    "ZeRO 0, by dimension": (2, EP1, 4, EP4, zero(0), BY_DIMENSION),
    "ZeRO 0, bf16, by dimension": (4, EP4, 2, EP2, {**zero(0), **BF16}, BRAIN | BY_DIMENSION),
    "ZeRO 1, by dimension": (2, EP2, 4, EP4, zero(1), BY_DIMENSION),
    "ZeRO 2, scheduler, split": (2, EP2, 2, EP1, {**zero(2), **WARMUP}, SPLIT),
    "ZeRO 2, bf16": (4, EP2, 2, EP2, {**zero(2), **BF16}, BRAIN),
    "ZeRO 2, bf16, to more": (2, EP1, 4, EP4, {**zero(2), **BF16}, BRAIN),
    "ZeRO 2, round robin": (2, EP1, 4, EP2, zero(2, round_robin_gradients=True), {}),
    "ZeRO 2, frozen": (2, EP2, 4, EP4, zero(2), {"freeze": True}),
    "ZeRO 2, split": (2, EP1, 4, EP2, zero(2), SPLIT),
    "ZeRO 2, residual": (2, {**EP2, "use_residual": True}, 4, {**EP4, "use_residual": True},
                         zero(2), {}),
    "ZeRO 2, tied": (2, TIED2, 2, TIED1, zero(2), {}),
    "ZeRO 2, saved by our layer": (2, EP2, 4, EP4, zero(2), {"kind": "comet_ds"}),
    "ZeRO 0, saved by our layer": (4, EP2, 2, EP1, zero(0), {"kind": "comet_ds"}),
    "ZeRO 2, offload": (2, EP1, 4, EP4, OFFLOAD, {}),
    "ZeRO 2, Muon": (4, EP2, 2, EP1, {**zero(2), **MUON}, {}),
    "BF16_Optimizer": (2, EP2, 4, EP2, {**zero(1), **BF16, **FP32_SUMS}, BRAIN),
    "BF16_Optimizer, to fewer": (4, EP4, 2, EP1, {**zero(1), **BF16, **FP32_SUMS}, BRAIN),
}  # fmt: skip
if HAS_ALIGNMENT:
    both = {"parameter_alignment": True, "round_robin_gradients": True}
    RESHARD["ZeRO 2, alignment"] = (2, EP1, 4, EP2, zero(2, **both), {})


def save(rank: int, size: int, folder: str, settings: dict, options: dict, **more: Any):
    """Train, save, train on; return the losses of what follows, and with noise."""
    dtype, limit = more.pop("dtype", torch.float32), more.pop("limit", None)
    data, saved_again = rank % more.pop("num_batches", 2), more.pop("saved_again", False)
    with machine(limit, dtype):
        engine = build(more.pop("kind", "deepspeed"), size, settings, options, **more)
        train(engine, data, STEPS, dtype)
        engine.save_checkpoint(folder, tag="saved")
        if saved_again:  # loading gives its groups a setting more
            engine.load_checkpoint(folder, tag="saved")
            engine.save_checkpoint(folder, tag="saved")
        expected = train(engine, data, STEPS, dtype)
        engine.load_checkpoint(folder, tag="saved")
        return expected, train(engine, data, STEPS, dtype, disturbance=1)


def resume(rank: int, size: int, folder: str, settings: dict, options: dict, **more: Any):
    """Return the losses with either layer, after each has written what it read."""
    dtype, limit = more.pop("dtype", torch.float32), more.pop("limit", None)
    data, curves = rank % more.pop("num_batches", 2), {}
    for of_saving in ("saved_again", "kind"):
        more.pop(of_saving, None)
    with machine(limit, dtype):
        for kind in ("deepspeed", "comet_ds"):
            engine = load(build(kind, size, settings, options, **more), folder, "saved")
            engine.save_checkpoint(folder, tag=f"again, {kind}")
            curves[kind] = train(engine, data, STEPS, dtype)
            engine.destroy()
    return curves


@pytest.mark.parametrize("name", RESHARD)
def test_reshard(world, tmp_path: Path, name: str) -> None:
    size, options, other_size, other_options, settings, more = RESHARD[name]
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    args = str(tmp_path), settings, options
    saved = world(size).run(functools.partial(save, **more), *args)
    dtype = more.get("dtype", torch.float32)
    with machine(more.get("limit"), dtype):
        sizes = {"ep_size": other_options["ep_size"], "num_ranks": other_size}
        reshard(Checkpoint.open(tmp_path, "saved"), there, **sizes)
        sizes = {"ep_size": options["ep_size"], "num_ranks": size}
        reshard(Checkpoint.open(there), back, **sizes)
    (tmp_path / "back/saved").rename(tmp_path / "back again")
    assert_same_files(str(tmp_path), "saved", "back again")
    args = there, settings, other_options
    found = world(other_size).run(functools.partial(resume, **more), *args)
    for rank, curves in enumerate(found):
        for kind, curve in curves.items():
            assert_few_steps(curve, *saved[rank % more.get("num_batches", 2)], f"{rank}, {kind}")
    assert_same_files(there, "saved", "again, comet_ds")


# ---- the command -------------------------------------------------------------------------------


def test_command(world, tmp_path: Path, capsys) -> None:
    settings = {**zero(2), **BF16}
    world(2).run(functools.partial(save_weights, **BRAIN), str(tmp_path), settings, EP2)
    other = tmp_path / "other"
    args = [str(other), "--ep-size", "4", "--num-ranks", "8"]
    main(["checkpoint", "reshard", str(tmp_path), *args])
    assert capsys.readouterr().out == f"{other / 'saved'}\n"
    assert len(list((other / "saved").glob("bf16_zero_pp_rank_*"))) == 8
    for folder, size, ranks, local in ((tmp_path / "saved", 2, 2, 2), (other, 4, 8, 1)):
        main(["checkpoint", "inspect", str(folder)])
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert lines["ZeRO"] == "stage   2" and lines["ep_size"] == str(size)
        assert lines["ranks"] == str(ranks)
        assert lines["parameters"] == "12,416: 672 dense, 11,744 of experts; bfloat16"
        assert lines["optimizer"] == f"Adam in ZeRO, partitioned, {ranks} files"
        assert lines["states"].startswith("weights float32, step 3")
        assert lines["MoE"].endswith(f"moe.1: 4 experts, {local} on a rank")
    for arguments, message in (
        (["reshard", str(tmp_path), *args], "exists already"),
        (
            ["reshard", str(tmp_path), str(tmp_path / "x"), "--ep-size", "3"],
            r"must divide .* got 3",
        ),
        (
            ["reshard", str(tmp_path), str(tmp_path / "x"), "--num-ranks", "3"],
            r"ranks \(3\), got 2",
        ),
        (["inspect", str(tmp_path / "nowhere")], "must be a DeepSpeed checkpoint"),
        (["inspect", str(tmp_path), "--tag", "no"], "must be a DeepSpeed checkpoint"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["checkpoint", *arguments])
    with pytest.raises(SystemExit, match="unknown command 'chekpoint'"):
        main(["chekpoint"])
    main(["--help"])
    assert "Inspect, consolidate or reshard a checkpoint" in capsys.readouterr().out


def test_settings_that_are_elsewhere(world, tmp_path: Path) -> None:
    """A run whose JSON was a file saves its path only."""
    settings = zero(2, round_robin_gradients=True)
    world(2).run(save_weights, str(tmp_path), settings, EP1)
    path, config_path = tmp_path / "saved" / MODEL_FILE, tmp_path / "ds.json"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "ds_config": str(config_path)}, path)
    args = [str(tmp_path), str(tmp_path / "there"), "--num-ranks", "4"]
    with pytest.raises(SystemExit, match=f"it only has the path {config_path}"):
        main(["checkpoint", "reshard", *args])
    consolidate(Checkpoint.open(tmp_path), tmp_path / "without.pt")
    config_path.write_text(json.dumps(config(2, **settings)))
    main(["checkpoint", "reshard", *args])
    moved = config_path.rename(tmp_path / "moved.json")
    args[1] = str(tmp_path / "again")
    main(["checkpoint", "reshard", *args, "--config", str(moved)])
    assert_same_files(str(tmp_path), "there/saved", "again/saved")
    consolidate(Checkpoint.open(tmp_path / "again", config=moved), tmp_path / "with.pt")
    assert_same(torch.load(tmp_path / "without.pt"), torch.load(tmp_path / "with.pt"), "weights")


def test_incomplete_and_foreign_checkpoints_are_refused(world, tmp_path: Path) -> None:
    """And so are files whose experts would be taken for others'."""
    world(2).run(save_weights, str(tmp_path), zero(1), EP2)
    folder = tmp_path / "saved"
    for name, message in (
        ("layer_1_expert_3_mp_rank_00_model_states.pt", "1 of 4 experts of MoE layer 1"),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "lacks 1 optimizer files"),
    ):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            Checkpoint.open(tmp_path)
        (tmp_path / name).rename(folder / name)
    path = folder / "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    first, second = (Path(str(path).format(i)) for i in range(2))
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    with pytest.raises(ValueError, match="are not the model's"):
        reshard(Checkpoint.open(tmp_path), tmp_path / "other", ep_size=1, num_ranks=2)
    (folder / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(ValueError, match="tensor and pipeline parallel"):
        Checkpoint.open(tmp_path)
