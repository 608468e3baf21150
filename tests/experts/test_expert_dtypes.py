# SPDX-License-Identifier: Apache-2.0
"""Experts whose parameters have another dtype than the input, by intent: they decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.distributed import error_of
from helpers.experts_zoo import HandWrittenMLP, NormMLP, randomize
from helpers.parity import FFN, HIDDEN, VARIANTS, tokens
from helpers.tolerance import assert_close
from torch import Tensor, nn

from comet_ds import MoE


class MLP(HandWrittenMLP):
    """Smooth: a rounding does not switch a gradient off."""

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x)))


class Casting(MLP):
    """Computes in its own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dense_h_to_4h.weight.dtype)).to(x.dtype)


class Widening(MLP):
    """And returns it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.dense_h_to_4h.weight.dtype))


class StaysInFp32(Casting):
    """Whatever the model is converted to."""

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        return super()._apply(lambda t: fn(t).float(), recurse)


class Autocasting(MLP):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return super().forward(x)


class Quantised(nn.Module):
    """8 bits a weight and nothing else."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        for name, shape in (("up", (ffn, hidden)), ("down", (hidden, ffn))):
            weight = torch.randint(0, 256, shape, dtype=torch.uint8)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        up, down = ((w.to(x.dtype) - 128) / 512 for w in (self.up, self.down))
        return F.linear(F.gelu(F.linear(x, up)), down)


# Expert, what happens to the layer, dtype of the input, dtype of the output.
CASES = {
    "fp32 in a bf16 model": (Casting, lambda m: None, torch.bfloat16, torch.bfloat16),
    "fp32 results": (Widening, lambda m: None, torch.bfloat16, torch.float32),
    "stays in fp32": (StaysInFp32, lambda m: m.bfloat16(), torch.bfloat16, torch.bfloat16),
    "bf16 in an fp32 model": (Casting, lambda m: m.bfloat16(), torch.float32, torch.float32),
    "own autocast": (Autocasting, lambda m: None, torch.bfloat16, torch.bfloat16),
    "uint8": (Quantised, lambda m: None, torch.bfloat16, torch.bfloat16),
    "uint8 in fp32": (Quantised, lambda m: None, torch.float32, torch.float32),
}


def make(cls: type[DeepSpeedMoE], rank: int, size: int, name: str, **options: Any) -> DeepSpeedMoE:
    expert, convert, *_ = CASES[name]
    torch.manual_seed(0)
    layer = cls(HIDDEN, expert(HIDDEN, FFN), num_experts=4, ep_size=size, k=2, **options)
    local = layer.num_local_experts
    for i, module in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        if expert is not Quantised:
            randomize(module, seed=rank * local + i)
    convert(layer)
    if size > 1:
        layer.set_deepspeed_parallelism()
    return layer


def step(layer: DeepSpeedMoE, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(7)
    output, l_aux, _ = layer(x)
    torch.autograd.backward([output, l_aux], [grad.to(output.dtype), torch.ones_like(l_aux)])
    gate = layer.deepspeed_moe.gate.wg.weight.grad
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    found = {f"grad of {n}": p.grad for n, p in experts.named_parameters() if p.requires_grad}
    found |= {"output": output, "l_aux": l_aux, "grad of x": x.grad, "grad of gate": gate}
    return {key: value.detach() for key, value in found.items()}


def check(rank: int, size: int, name: str) -> None:
    *_, dtype, of_output = CASES[name]
    rounded = torch.float32 if name == "uint8 in fp32" else torch.bfloat16
    x, grad = tokens(rank, (40, HIDDEN), dtype)
    expected = step(make(DeepSpeedMoE, rank, size, name), x, grad)
    for variant, block in VARIANTS.items():
        got = step(make(MoE, rank, size, name, comet_ds=block), x, grad)
        assert got["output"].dtype == of_output
        assert set(got) == set(expected)
        for key, value in expected.items():
            assert_close(got[key].to(rounded), value.to(rounded), f"{variant}: {key}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_as_in_deepspeed(world, size: int, name: str) -> None:
    if size == 1:
        check(0, 1, name)
    else:
        world(size).run(check, name)


def check_different_dtypes(rank: int, size: int, variant: str, name: str) -> str:
    """Rank 1 brings another dtype than rank 0, and both would do."""
    layer = make(MoE, rank, size, name, comet_ds=VARIANTS[variant])
    dtype = torch.float16 if rank else torch.float32
    message = error_of(layer, torch.randn(8, HIDDEN, dtype=dtype))
    for same in (torch.float16, torch.float32):  # and the next calls work
        assert layer(torch.randn(8, HIDDEN, dtype=same))[0].isfinite().all()
    return message


@pytest.mark.parametrize("variant", ["reference", "2 chunks"])
@pytest.mark.parametrize("name", ["fp32 in a bf16 model", "uint8"])
def test_ranks_bring_the_same_dtype(world, variant: str, name: str) -> None:
    for message in world(2).run(check_different_dtypes, variant, name, timeout=60):
        assert "the same dtype on all ranks" in message
        assert message.endswith("got torch.float32 on rank 0 and torch.float16 on rank 1")


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_cannot_be_meant_is_refused(variant: str) -> None:
    """An MLP that is recognised takes its own dtype, integers nobody."""
    block = VARIANTS[variant]
    plain = MoE(HIDDEN, HandWrittenMLP(HIDDEN, FFN), 4, comet_ds=block)
    with pytest.raises(ValueError, match=r"the experts' dtype torch.float32, got torch.bfloat16"):
        plain(torch.randn(8, HIDDEN).bfloat16())
    for name in ("fp32 in a bf16 model", "uint8"):
        layer = make(MoE, 0, 1, name, comet_ds=block)
        with pytest.raises(ValueError, match="hidden_states must be floating point"):
            layer(torch.ones(8, HIDDEN, dtype=torch.int64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_expert_that_cannot_take_it_says_so(variant: str) -> None:
    layer = MoE(HIDDEN, NormMLP(HIDDEN, FFN), 4, comet_ds=VARIANTS[variant])
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        layer(torch.randn(8, HIDDEN).bfloat16())


def test_experts_that_convert_themselves_are_not_stacked() -> None:
    layer = MoE(HIDDEN, StaysInFp32(HIDDEN, FFN), 4).bfloat16()
    experts = layer.deepspeed_moe.experts
    assert experts.reason == "StaysInFp32 has an _apply of its own"
    assert {p.dtype for p in experts.parameters()} == {torch.float32}
