# SPDX-License-Identifier: Apache-2.0
"""What a layer keeps of a forward, and copies of layers that have run."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from deepspeed.moe import sharded_moe
from helpers.experts_zoo import sequential
from helpers.parity import FFN, HIDDEN, VARIANTS, build, tokens
from helpers.training import batches, build_engine, config, train
from torch import nn

from comet_ds import MoE


@pytest.mark.parametrize("shape", [(6, HIDDEN), (2, 3, HIDDEN)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_and_input_are_let_go(variant: str, k: int, shape: tuple) -> None:
    layer = build(MoE, 0, k=k, comet_ds=VARIANTS[variant])
    for reads_loss in (False, True):
        hidden = nn.Linear(HIDDEN, HIDDEN)(torch.randn(shape))
        alive = weakref.ref(hidden)
        output = layer(hidden)[0]
        if reads_loss:
            (output.sum() + layer.deepspeed_moe.l_aux).backward()
        value = layer.deepspeed_moe.l_aux.item()
        del hidden, output
        gc.collect()
        assert alive() is None
        assert layer.deepspeed_moe.l_aux.item() == value  # without a graph
        assert layer.deepspeed_moe.l_aux.grad_fn is None
        assert layer.deepspeed_moe.exp_counts.sum() == 6 * k


def gate_grads(reads_attributes: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layers = [build(MoE, 0, k=2) for _ in range(2)]
    x, losses = torch.randn(6, HIDDEN), []
    for layer in layers:
        output, l_aux, _ = layer(x)
        if not reads_attributes:
            losses.append(l_aux)
        x = x + output
    del output, l_aux
    gc.collect()
    if reads_attributes:
        losses = [layer.deepspeed_moe.l_aux for layer in layers]
    sum(losses).backward()
    return [layer.deepspeed_moe.gate.wg.weight.grad for layer in layers]


def test_the_loss_can_be_read_from_the_layer() -> None:
    """By those who drop what the layer returns and add up attributes before their backward."""
    for got, expected in zip(gate_grads(True), gate_grads(False), strict=True):
        assert torch.equal(got, expected) and got.abs().sum() > 0


def test_without_gradients_the_loss_stays() -> None:
    layer = build(MoE, 0, k=2)
    with torch.no_grad():
        _, l_aux, _ = layer(torch.randn(6, HIDDEN))
    assert layer.deepspeed_moe.l_aux is l_aux
    layer.deepspeed_moe.l_aux = torch.tensor(3.0)  # as DeepSpeed's attribute, it can be set
    assert layer.deepspeed_moe.l_aux == 3 and layer.deepspeed_moe.exp_counts.sum() == 12


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


def check_copies(rank: int, size: int, how: str, variant: str, stock: bool) -> None:
    """After a training forward, whose graph is there; ep_size 2 of 2 or 4 ranks."""
    block = VARIANTS[variant]
    layer = build(MoE, rank, ep_size=2, k=2, comet_ds=block, drop_tokens=False)
    if stock:  # holds its process group, which cannot be copied
        own = layer.deepspeed_moe.gate
        layer.deepspeed_moe.gate = sharded_moe.TopKGate(HIDDEN, 8, 2, drop_tokens=False)
        layer.deepspeed_moe.gate.load_state_dict(own.state_dict())
    layer.set_deepspeed_parallelism()
    x, _ = tokens(rank, (12, HIDDEN))
    output, l_aux, _ = layer(nn.Linear(HIDDEN, HIDDEN)(x))
    made = COPIES[how](layer)
    assert made.deepspeed_moe.l_aux is None and made.deepspeed_moe.ep_group is None
    assert made.deepspeed_moe.gate.ep_group is None
    assert layer.deepspeed_moe.gate.ep_group is not None
    results = []
    for module in (layer, made):
        torch.manual_seed(3)
        results.append(module(x))
        (results[-1][0].sum() + results[-1][1]).backward()
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    (output.sum() + l_aux).backward()  # the first forward's graph is whole


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("variant", ["reference", "2 chunks"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_parallel_layers(world, how: str, variant: str, size: int) -> None:
    world(size).run(check_copies, how, variant, False)


def test_copies_of_a_gate_that_holds_its_group(world) -> None:
    world(2).run(check_copies, "deepcopy", "2 chunks", True)


def check_engine(rank: int, size: int, stage: int, folder: str) -> None:
    """A moving average of an engine's model, with metrics, in the middle of training."""
    monitor = {"csv_monitor": {"enabled": True, "output_path": folder, "job_name": "job"}}
    settings = config(size, zero_optimization={"stage": stage}, **monitor)
    engine = build_engine("comet_ds", settings, ep_size=size, k=2)
    train(engine, rank, 2)
    x, target = next(iter(batches(rank, 1)))
    loss = engine(x, target)
    made = copy.deepcopy(engine.module)
    average = torch.optim.swa_utils.AveragedModel(engine.module)
    average.update_parameters(engine.module)
    engine.backward(loss)
    engine.step()
    losses = []
    for module in (made, average.module):
        torch.manual_seed(9)
        losses.append(module(x, target).item())
    assert losses[0] == losses[1]
    for param in made.parameters():
        assert param.grad is None


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_copies_of_an_engines_module(world, stage: int, tmp_path) -> None:
    world(2).run(check_engine, stage, str(tmp_path))


def test_expert_of_the_layer_is_the_users() -> None:
    """A copy's residual MLP is its own."""
    layer = MoE(HIDDEN, sequential(HIDDEN, FFN), 4, k=2, use_residual=True)
    layer(torch.randn(6, HIDDEN))
    made = copy.deepcopy(layer)
    assert made.mlp is not layer.mlp and made.deepspeed_moe.l_aux is None
