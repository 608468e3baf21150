# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that do not fit the run are refused with the reason before a weight is loaded.

Another layout of ranks, other settings of ZeRO, and files that hold stacks; weights alone still
load.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpointing import (
    EP1,
    EP2,
    HAS_ALIGNMENT,
    SPLIT,
    STEPS,
    assert_same,
    build,
    machine,
    uneven,
)
from helpers.training import (
    train,
    zero,
)

ODD = {**EP1, "expert": functools.partial(uneven, less=1)}  # to be aligned


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
