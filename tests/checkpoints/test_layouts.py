# SPDX-License-Identifier: Apache-2.0
"""Where parameters lie in DeepSpeed's flat groups: worked out by hand, and asked of DeepSpeed."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
from helpers.checkpointing import (
    machine,
)
from helpers.training import (
    CLASSES,
    Model,
)
from torch import nn

from comet_ds.checkpoints.flat_groups import flatten, plan_moves, run_moves
from comet_ds.checkpoints.layout import NativeParameter, ParameterTable, find_clusters
from comet_ds.experts.stacked import StackedExperts


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
@pytest.mark.parametrize("is_given_groups", [False, True], ids=["one group", "groups by decay"])
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
