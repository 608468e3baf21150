# SPDX-License-Identifier: Apache-2.0
"""What the fused path refuses: pinned it is an error, else another path takes over and is right."""

from __future__ import annotations

import pytest
import torch
from deepspeed.utils import logger
from helpers.experts_zoo import DropoutInTraining, GatedMLP
from helpers.fused_layers import build_fused, draw_case
from helpers.mlp_forms import BF16
from helpers.parity import build, run
from helpers.tolerance import assert_close
from torch import nn

from comet_ds import MoE


@pytest.mark.gpu(1)
def test_launches_refuse_other_tensors() -> None:
    """Every tensor of a launch is checked, and named with what it must be."""
    shape = (64, 8, 2, 128, 192)
    (x, _), layer = draw_case(shape, BF16), build_fused(shape, "swiglu", BF16)
    layer(x)
    fused, gate = layer.deepspeed_moe.fused, layer.deepspeed_moe.gate
    call = fused.prepare(fused.weights, (64,), gate)
    routing = gate.route(call.begin(x))
    message = r"topk_weights must be contiguous Float \[64, 2\] on a CUDA device, got "
    for wrong, got in (
        (routing.topk_weights.double(), r"Double \[64, 2\] on cuda:0"),
        (routing.topk_weights[:, :1], r"Float \[64, 1\] on cuda:0"),
        (routing.topk_weights.cpu(), r"Float \[64, 2\] on cpu"),
    ):
        with pytest.raises(ValueError, match=message + got):
            call.run(routing._replace(topk_weights=wrong))


def misalign(layer: MoE) -> None:
    param = next(layer.deepspeed_moe.experts.parameters())
    flat = torch.empty(param.numel() + 1, dtype=param.dtype, device=param.device)
    flat[1:] = param.detach().flatten()
    param.data = flat[1:].view_as(param)


REFUSED = {
    "hooks": (lambda m: m.deepspeed_moe.experts.deepspeed_experts[1].w1.register_forward_hook(
        lambda *_: None), "hooks"),
    "misaligned": (misalign, "multiples of 16 bytes"),
    "fp32": (lambda m: m.float(), "bfloat16 or float16, not torch.float32"),
    "other form": (lambda m: setattr(m.deepspeed_moe.experts.deepspeed_experts[1], "act_fn",
        nn.ReLU()), "differ in form"),
}  # fmt: skip


@pytest.mark.gpu(1)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned it is an error; else the pipelined path takes over, says why, and is right."""
    said: list[str] = []
    monkeypatch.setattr(logger, "log_dist_once", lambda message, **_: said.append(message))
    change, phrase = REFUSED[name]
    shape = (64, 8, 2, 128, 192)
    results = []
    for block in ({"path": "fused"}, {}, {"path": "reference"}):
        layer = build_fused(shape, "swiglu", BF16, comet_ds=block)
        change(layer)
        x, grad = draw_case(shape, next(layer.parameters()).dtype)
        if block == {"path": "fused"}:
            with pytest.raises(RuntimeError, match=f'"fused" is pinned and cannot run: .*{phrase}'):
                layer(x)
            continue
        results.append(run(layer, x, grad))
        if not block:
            assert layer.deepspeed_moe.path == "pipelined"
            assert any("not fused: " in line and phrase in line for line in said), said
    for what, value in results[1].items():
        assert_close(results[0][what], value, f"{name}: {what}")


@pytest.mark.gpu(1)
def test_dropout_runs_fused_in_evaluation_only() -> None:
    layer = build(MoE, 0, expert=DropoutInTraining(64, 96), k=2, dtype=BF16, device="cuda")
    x = torch.randn(64, 64, device="cuda", dtype=BF16)
    layer(x)
    assert layer.deepspeed_moe.path == "pipelined"
    layer.eval()(x)
    assert layer.deepspeed_moe.path == "fused"


def test_pinned_on_a_cpu() -> None:
    layer = build(MoE, 0, expert=GatedMLP(64, 96), dtype=BF16, comet_ds={"path": "fused"})
    with pytest.raises(RuntimeError, match=r"cannot run: it needs a CUDA device, not cpu"):
        layer(torch.randn(4, 64, dtype=BF16))


def check_pinned(rank: int, size: int) -> str:
    layer = build(MoE, rank, ep_size=size, parallel=True, comet_ds={"path": "fused"})
    try:
        layer(torch.randn(4, 16))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_pinned_with_expert_parallelism(world) -> None:
    for answer in world(2).run(check_pinned):
        assert "cannot run: it needs a CUDA device, not cpu" in answer
