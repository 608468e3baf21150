# SPDX-License-Identifier: Apache-2.0
"""The fused path on one GPU is as accurate as DeepSpeed's layer, and repeats its bits.

For every form of expert and for sizes that divide by nothing: outputs and gradients against fp64,
the routes DeepSpeed drops, one expert that gets all tokens, inputs that start anywhere.
"""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from helpers.experts_zoo import randomize
from helpers.fused_layers import Shape, build_fused, draw_case
from helpers.mlp_forms import BF16, FORMS, FP16
from helpers.parity import oracle, run
from helpers.tolerance import assert_as_accurate, assert_close

SHAPES: dict[str, Shape] = {
    "one token": (1, 8, 2, 64, 96),
    "experts without tokens": (7, 8, 3, 200, 136),
    "experts no power of two": (63, 5, 2, 128, 320),
    "many experts, sizes within a tile": (129, 12, 6, 1032, 72),
    "a token to every expert": (700, 8, 8, 72, 520),
    "one route, several tiles an expert": (1024, 3, 1, 256, 256),
}


def check_against_fp64(shape: Shape, form: str, dtype: torch.dtype) -> None:
    """Every result's error is at most 1.5 times DeepSpeed's; experts' gradients all together."""
    x, grad = draw_case(shape, dtype)
    layer = build_fused(shape, form, dtype, comet_ds={"path": "fused", "exact_gate": True})
    runs = {
        "fused": run(layer, x, grad),
        "deepspeed": run(build_fused(shape, form, dtype, cls=DeepSpeedMoE), x, grad),
    }
    assert layer.deepspeed_moe.path == "fused"
    experts = [
        randomize(FORMS[form](*shape[3:]), i).to("cuda", dtype).double() for i in range(shape[1])
    ]
    truth = oracle(layer, x, grad, experts)
    expected_grads = torch.cat([g.flatten() for g in truth["grads of experts"]])
    has_gate_grad = shape[0] > 1 and shape[2] < shape[1]
    results = {}
    for name, got in runs.items():
        expert_grads = [g.flatten() for n, g in got.items() if "deepspeed_experts" in n]
        results[name] = {
            "output": got["output"],
            "grad of x": got["grad of x"],
            "grads of experts": torch.cat(expert_grads),
            "grad of gate": got["grad of deepspeed_moe.gate.wg.weight"],
        }
    truth["grads of experts"] = expected_grads
    for what, ours in results["fused"].items():
        # One token's gate gradient is one draw of a rounding error; k = E has none.
        if what != "grad of gate" or has_gate_grad:
            theirs = results["deepspeed"][what]
            assert_as_accurate(ours, theirs, truth[what], f"{form} {shape}: {what}")


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms_against_fp64(form: str, dtype: torch.dtype) -> None:
    check_against_fp64((300, 8, 2, 128, 192), form, dtype)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("form", ["swiglu", "gelu with biases"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_against_fp64(shape: Shape, form: str) -> None:
    check_against_fp64(shape, form, BF16)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("factor", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_dropping_is_deepspeeds(k: int, factor: float) -> None:
    """Many experts, many tokens, several tiles an expert: everything equal to rounding."""
    shape = (4096, 32, k, 256, 384)
    x, grad = draw_case(shape, BF16)
    options = dict(drop_tokens=True, capacity_factor=factor)
    ours = build_fused(
        shape, "swiglu", BF16, comet_ds={"path": "fused", "exact_gate": True}, **options
    )
    got = run(ours, x, grad)
    theirs = run(build_fused(shape, "swiglu", BF16, cls=DeepSpeedMoE, **options), x, grad)
    dropped = (ours.deepspeed_moe.routing.topk_ids < 0).float().mean().item()
    assert (dropped > 0.3) if factor == 0.4 else (dropped < 0.5)
    for what, value in theirs.items():
        assert_close(got[what], value, f"{k=} {factor=}: {what}")


@pytest.mark.gpu(1)
def test_all_tokens_to_one_expert() -> None:
    shape = (700, 8, 1, 128, 192)
    x, grad = draw_case(shape, BF16)
    x[:, 0] = 5
    layers = [
        build_fused(shape, "swiglu", BF16),
        build_fused(shape, "swiglu", BF16, comet_ds={"path": "reference"}),
    ]
    for layer in layers:
        layer.deepspeed_moe.gate.wg.weight.data[3, 0] = 10
    got, expected = (run(layer, x, grad) for layer in layers)
    assert got["exp_counts"].tolist() == [0, 0, 0, 700, 0, 0, 0, 0]
    for what, value in expected.items():
        assert_close(got[what], value, what)
        if "deepspeed_experts" in what and ".3." not in what:
            assert got[what].count_nonzero() == 0, what


@pytest.mark.gpu(1)
@pytest.mark.parametrize("form", ["swiglu with biases", "gelu"])
def test_bitwise_repeatable(form: str) -> None:
    """Also on another stream, with other sizes and a NaN in between."""
    shape = (1000, 8, 3, 256, 384)
    x, grad = draw_case(shape, BF16)
    layer = build_fused(shape, form, BF16, drop_tokens=True)
    first = run(layer, x, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(20):
            run(layer, x[: 40 * step], grad[: 40 * step])
            bad = x.clone()
            bad[5] = float("nan")
            assert run(layer, bad, grad)["output"].isnan().any()
            again = run(layer, x, grad)
            for what, value in first.items():
                assert torch.equal(again[what], value), f"step {step}: {what}"


@pytest.mark.gpu(1)
def test_misaligned_input() -> None:
    """A view that starts anywhere in its storage, also for the gradient."""
    shape = (300, 8, 2, 128, 192)
    x, grad = draw_case(shape, BF16)
    layer = build_fused(shape, "swiglu", BF16, comet_ds={"path": "fused", "exact_gate": True})
    expected = run(layer, x, grad)
    views = []
    for tensor in (x, grad):
        storage = torch.empty(tensor.numel() + 1, dtype=BF16, device="cuda")
        storage[1:] = tensor.flatten()
        views.append(storage[1:].view_as(tensor))
    flat = views[0].requires_grad_()
    torch.manual_seed(7)
    output, l_aux, _ = layer(flat)
    torch.autograd.backward([output, l_aux], [views[1], torch.ones_like(l_aux)])
    assert torch.equal(output, expected["output"]) and torch.equal(flat.grad, expected["grad of x"])
