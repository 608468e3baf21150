# SPDX-License-Identifier: Apache-2.0
"""Recognising MLPs by what they compute, and applying experts."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.experts_zoo import (
    ClampedMLP,
    DropoutInTraining,
    GatedMLP,
    HandWrittenMLP,
    KeywordMLP,
    NormMLP,
    TiedMLP,
    TupleMLP,
    UpFirstMLP,
    randomize,
    sequential,
)
from helpers.tolerance import assert_close
from torch import nn

from comet_ds import MoE
from comet_ds.experts.calls import run_expert, run_experts
from comet_ds.experts.mlp import ExpertMLP, RecognisedExperts, recognise_mlp
from comet_ds.experts.structure import ModuleStructure
from comet_ds.pipelined.grouped_mlp import ExpertRunner, _Stack

HIDDEN, FFN = 16, 40

RECOGNISED = {
    "sequential": (sequential(HIDDEN, FFN), "gelu MLP"),
    "sequential without biases": (sequential(HIDDEN, FFN, bias=False), "gelu MLP"),
    "hand-written": (HandWrittenMLP(HIDDEN, FFN), "relu MLP"),
    "gated": (GatedMLP(HIDDEN, FFN), "gated silu MLP"),
    "gated with biases": (GatedMLP(HIDDEN, FFN, bias=True), "gated silu MLP"),
    "up times act(gate)": (UpFirstMLP(HIDDEN, FFN), "gated gelu_tanh MLP"),
}
REFUSED = {
    "dropout": (sequential(HIDDEN, FFN, dropout=0.1), "Dropout"),
    "normalisation": (NormMLP(HIDDEN, FFN), "one more Linear"),
    "tuple output": (TupleMLP(HIDDEN, FFN), "returns a tuple"),
    "shared parameter": (TiedMLP(HIDDEN), "share a parameter"),
    "third matrix": (nn.Sequential(sequential(HIDDEN, FFN), nn.Linear(HIDDEN, HIDDEN)), "Linear"),
    "no activation": (nn.Sequential(nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)), "Linear"),
    "one matrix": (nn.Linear(HIDDEN, HIDDEN), ""),
    "in-place clamp": (ClampedMLP(HIDDEN, FFN), "clamp_ outside the MLP"),
    "keyword call": (KeywordMLP(HIDDEN, FFN), "Linear"),
    "activation unknown": (
        nn.Sequential(nn.Linear(HIDDEN, FFN), nn.Tanh(), nn.Linear(FFN, HIDDEN)),
        "Tanh",
    ),
}


def make(name: str, seed: int) -> torch.nn.Module:
    """Return a copy with weights of its own, whose ReLUs see no input near zero.

    There the two ways to run it would differ by whole gradients, not by rounding.
    """
    expert = randomize(copy.deepcopy(RECOGNISED[name][0]), seed)
    if isinstance(expert, HandWrittenMLP):
        torch.nn.init.constant_(expert.dense_h_to_4h.bias, 5.0)
        expert.dense_h_to_4h.bias.data[::2] = -5.0
    return expert


def ends(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("name", RECOGNISED)
def test_recognised(name: str) -> None:
    expert, description = RECOGNISED[name]
    mlp = recognise_mlp(randomize(expert, 1))
    assert isinstance(mlp, ExpertMLP), mlp
    assert mlp.describe() == description
    x = torch.randn(5, HIDDEN)
    assert_close(mlp(x), expert(x), name)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    expert, phrase = REFUSED[name]
    reason = recognise_mlp(expert)
    assert isinstance(reason, str) and phrase in reason, reason


def test_train_and_eval_are_recognised_apart() -> None:
    """First seen in eval mode, a module that drops out in training must not stay recognised."""
    experts, recognised = [DropoutInTraining(HIDDEN, FFN)], RecognisedExperts()
    experts[0].eval()
    found = recognised.find(experts)
    assert isinstance(found, list)
    experts[0].train()
    assert "dropout" in recognised.find(experts)
    experts[0].eval()
    assert recognised.find(experts) is found


def test_probe_catches_a_module_that_lies() -> None:
    """A module may compute something else when it is called than when it is traced."""

    class Lying(HandWrittenMLP):
        def __call__(self, x):
            return super().__call__(x) * 1.5

    assert "probe" in recognise_mlp(Lying(HIDDEN, FFN))


def test_structure_notices_changes() -> None:
    changes = {
        "hook": lambda e: e.w1.register_forward_hook(lambda *_: None),
        "replaced matrix": lambda e: setattr(e, "w2", nn.Linear(FFN, HIDDEN)),
        "replaced activation": lambda e: setattr(e, "act_fn", nn.GELU()),
        "evaluation mode": lambda e: e.act_fn.eval(),
        "patched forward": lambda e: setattr(e.w1, "forward", e.w1.forward),
    }
    for name, change in changes.items():
        experts = [GatedMLP(HIDDEN, FFN) for _ in range(2)]
        structure = ModuleStructure(experts)
        assert structure.holds(experts)
        change(experts[1])
        assert not structure.holds(experts), name
    assert not structure.holds(experts[:1]), "another list"


def test_modes_that_compute_the_same_are_equal() -> None:
    """So switching between them makes no new tables of weights."""
    experts, recognised = [GatedMLP(HIDDEN, FFN) for _ in range(2)], RecognisedExperts()
    found = recognised.find(experts)
    for expert in experts:
        expert.eval()
    assert recognised.find(experts) == found and recognised.find(experts) is not found
    assert found != RecognisedExperts().find([GatedMLP(HIDDEN, FFN) for _ in range(2)])


def test_copies_notice_changes() -> None:
    """What is remembered of modules must not be of the modules a copy was made from."""
    experts, recognised = [GatedMLP(HIDDEN, FFN)], RecognisedExperts()
    recognised.find(experts)
    experts, recognised = copy.deepcopy((experts, recognised))
    assert isinstance(recognised.find(experts), list)
    experts[0].w1.register_forward_hook(lambda *_: None)
    assert "hooks" in recognised.find(experts)


def test_tracing_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    recognise_mlp(RECOGNISED["gated"][0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "counts",
    [[3, 0, 4, 1], [0, 0, 0, 8], [2, 2, 2, 2]],
    ids=["one without rows", "all rows to one", "as many rows each"],
)
@pytest.mark.parametrize("name", RECOGNISED)
def test_grouped_equals_one_by_one(name: str, counts: list[int]) -> None:
    """Values and gradients, with and without biases, with experts without rows."""
    torch.manual_seed(0)
    experts = [make(name, i).bfloat16() for i in range(4)]
    runner = ExpertRunner(experts)
    assert runner._recognise() is None
    runner.reason = None  # on a CUDA device refresh() would say so
    rows = torch.randn(8, HIDDEN).bfloat16().requires_grad_()
    grad = torch.randn(8, HIDDEN).bfloat16()
    results = []
    for grouped in (True, False):
        if grouped:
            stacked = runner.stack(range(4))
            output = runner.run(rows, range(4), stacked, ends(counts), None)
        else:
            output = run_experts(experts, rows, counts)
        params = [p for e in experts for p in e.parameters()]
        results.append((output, *torch.autograd.grad(output, [rows, *params], grad)))
    for got, expected in zip(*results, strict=True):
        assert_close(got, expected, name)
    grads = iter(results[0][2:])
    for expert, count in zip(experts, counts, strict=True):
        for _ in expert.parameters():
            assert (next(grads).abs().sum() > 0) == (count > 0)


def test_rows_behind_the_last_expert_are_ignored() -> None:
    experts = [randomize(GatedMLP(HIDDEN, FFN, bias=True), i).bfloat16() for i in range(2)]
    runner = ExpertRunner(experts)
    runner._recognise()
    runner.reason = None
    rows = torch.randn(8, HIDDEN).bfloat16()
    rows[5:] = float("nan")
    rows.requires_grad_()
    output = runner.run(rows, range(2), runner.stack(range(2)), ends([2, 3]), None)
    loss = output[:5].float().sum()
    for grad in torch.autograd.grad(loss, [p for e in experts for p in e.parameters()]):
        assert grad.isfinite().all()


def test_stack_views_a_flat_buffer() -> None:
    """ZeRO's layout: [w0 b0 w1 b1 ...] in one storage, which needs no copy."""
    flat = torch.randn(4 * (8 * 16 + 8))
    weights = [flat[i * 136 : i * 136 + 128].view(8, 16).requires_grad_() for i in range(4)]
    stacked = _Stack.apply(*weights)
    assert stacked.data_ptr() == flat.data_ptr()
    assert torch.equal(stacked, torch.stack(list(weights)))
    grads = torch.autograd.grad(stacked, weights, torch.arange(4.0).view(4, 1, 1).expand(4, 8, 16))
    assert [g.unique().item() for g in grads] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "cuts",
    [[0, 136, 272, 400], [4, 132, 260, 388], [384, 256, 128, 0]],
    ids=["uneven stride", "misaligned start", "descending"],
)
def test_stack_copies_other_layouts(cuts: list[int]) -> None:
    flat = torch.randn(600).half()
    weights = [flat[i : i + 128].view(8, 16) for i in cuts]
    stacked = _Stack.apply(*weights)
    assert torch.equal(stacked, torch.stack(weights))
    assert stacked.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()


def test_separate_storages_are_copied() -> None:
    weights = [torch.randn(8, 16) for _ in range(3)]
    assert torch.equal(_Stack.apply(*weights), torch.stack(weights))


def test_idle_expert_gets_zero_gradients() -> None:
    expert = sequential(HIDDEN, FFN)
    output = run_expert(expert, torch.empty(0, HIDDEN))
    assert output.shape == (0, HIDDEN)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in expert.parameters())


def test_expert_is_called_with_deepspeeds_rank() -> None:
    shapes = []

    class Spy(nn.Module):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            return x, "bias"

    run_expert(Spy(), torch.randn(3, HIDDEN))
    assert shapes == [(1, 1, 3, HIDDEN)]


def test_wrong_output_shape() -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 16\), got \(1, 1, 3, 40\) from Linear"):
        run_expert(nn.Linear(HIDDEN, FFN), torch.randn(3, HIDDEN))


@pytest.mark.parametrize(
    ("grouped", "phrase"),
    [(False, "off in the configuration"), (True, "needs a CUDA device, not cpu")],
    ids=["configured", "on a CPU"],
)
def test_grouped_gemm_says_why_not(grouped: bool, phrase: str) -> None:
    runner = ExpertRunner([GatedMLP(HIDDEN, FFN)], grouped_gemm=grouped)
    runner.refresh(torch.randn(4, HIDDEN).bfloat16(), expected_rows=1)
    assert phrase in runner.reason
    assert phrase in runner.describe()


def test_forms_that_differ_are_not_grouped() -> None:
    experts = [sequential(HIDDEN, FFN).bfloat16(), GatedMLP(HIDDEN, FFN).bfloat16()]
    assert ExpertRunner(experts)._recognise() == "the experts differ in form"
    odd = [GatedMLP(HIDDEN, 20).bfloat16()]
    assert "multiples of 8, got 20" in ExpertRunner(odd)._recognise()
    wide = [GatedMLP(HIDDEN, FFN)]
    assert "bfloat16 parameters" in ExpertRunner(wide)._recognise()


@pytest.mark.gpu(1)
@pytest.mark.parametrize("name", RECOGNISED)
@pytest.mark.parametrize(
    "counts", [[300, 0, 5, 1], [0, 0, 0, 700]], ids=["one without rows", "all rows to one"]
)
def test_grouped_on_gpu(name: str, counts: list[int]) -> None:
    torch.manual_seed(0)
    experts = [make(name, i).to("cuda", torch.bfloat16) for i in range(4)]
    runner = ExpertRunner(experts)
    num_rows = sum(counts)
    rows = torch.randn(num_rows + 3, HIDDEN, device="cuda").bfloat16()
    rows[num_rows:] = float("nan")
    rows.requires_grad_()
    runner.refresh(rows, expected_rows=1)
    assert runner.reason is None, runner.reason
    grad = torch.randn(num_rows, HIDDEN, device="cuda").bfloat16()
    params = [p for e in experts for p in e.parameters()]
    offsets = ends(counts).cuda()
    got = runner.run(rows, range(4), runner.stack(range(4)), offsets, None)[:num_rows]
    expected = run_experts(experts, rows[:num_rows], counts)
    for a, b in zip(
        (got, *torch.autograd.grad(got, params, grad)),
        (expected, *torch.autograd.grad(expected, params, grad)),
        strict=True,
    ):
        assert_close(a, b, name)


WRONG_OUTPUTS = {
    "dict": (lambda y: {"y": y}, "got dict from Answering"),
    "list": (lambda y: [y], "got list from Answering"),
    "None": (lambda y: None, "got NoneType from Answering"),
    "empty tuple": (lambda y: (), "got tuple from Answering"),
    "tuple of a dict": (lambda y: ({"y": y}, None), "got a tuple that starts with dict from"),
}


class Answering(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.linear, self.answer = nn.Linear(HIDDEN, HIDDEN), answer

    def forward(self, x: torch.Tensor):
        return self.answer(self.linear(x))


@pytest.mark.parametrize("path", ["reference", "pipelined"])
@pytest.mark.parametrize("name", WRONG_OUTPUTS)
def test_what_no_expert_may_return(name: str, path: str) -> None:
    answer, message = WRONG_OUTPUTS[name]
    layer = MoE(HIDDEN, Answering(answer), 2, use_residual=True, comet_ds={"path": path})
    with pytest.raises(ValueError, match=f"an expert must return a tensor, .* {message}"):
        layer(torch.randn(4, HIDDEN))
    # Experts in one call, as where they have hooks.
    layer.deepspeed_moe.experts.forward = lambda inputs: answer(inputs)
    with pytest.raises(ValueError, match=r"Experts must return a tensor, .* got "):
        layer(torch.randn(4, HIDDEN))
