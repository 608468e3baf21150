# SPDX-License-Identifier: Apache-2.0
"""The fused path: right against fp64 and DeepSpeed, repeatable, and refused where it cannot run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from experts_zoo import DropoutInTraining, GatedMLP, randomize
from mlp_forms import BF16, FORMS, FP16
from parity import build, oracle, run
from tolerance import ERROR_RATIO, assert_close, relative_error
from torch import nn

from comet_ds import MoE
from comet_ds.kernels import load_kernels

# num_tokens, num_experts, k, hidden, ffn: sizes that are no multiple of a tile, few tokens, experts
# without tokens, a number of experts that is no power of two.
SHAPES = [
    (1, 8, 2, 64, 96),
    (7, 8, 3, 200, 136),
    (63, 5, 2, 128, 320),
    (129, 12, 6, 1032, 72),
    (700, 8, 8, 72, 520),
    (1024, 3, 1, 256, 256),
]


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return tuple(torch.randn(shape[0], shape[3], device="cuda").to(dtype) for _ in range(2))


def build_fused(shape: tuple[int, ...], form: str, dtype: torch.dtype, **options) -> MoE:
    _, num_experts, k, hidden, ffn = shape
    options = {"comet_ds": {"path": "fused"}, "drop_tokens": False, **options}
    cls = options.pop("cls", MoE)
    if cls is DeepSpeedMoE:
        del options["comet_ds"]
    return build(
        cls,
        0,
        expert=FORMS[form](hidden, ffn),
        num_experts=num_experts,
        k=k,
        dtype=dtype,
        device="cuda",
        **options,
    )


def check_against_fp64(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    """Every result's error is at most 1.5 times DeepSpeed's; experts' gradients all together."""
    x, grad = case(shape, dtype)
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
    errors = {}
    for name, got in runs.items():
        expert_grads = [g.flatten() for n, g in got.items() if "deepspeed_experts" in n]
        gate_grad = got["grad of deepspeed_moe.gate.wg.weight"]
        errors[name] = [
            relative_error(got["output"], truth["output"]),
            relative_error(got["grad of x"], truth["grad of x"]),
            relative_error(torch.cat(expert_grads), expected_grads),
            # One token's gate gradient is one draw of a rounding error; k = E has none.
            relative_error(gate_grad, truth["grad of gate"]) if has_gate_grad else 0.0,
        ]
    names = ("output", "grad of x", "grads of experts", "grad of gate")
    for what, ours, theirs in zip(names, errors["fused"], errors["deepspeed"], strict=True):
        assert ours <= ERROR_RATIO * theirs, f"{form} {shape}: {what}: {ours} > 1.5 * {theirs}"


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_forms_against_fp64(form: str, dtype: torch.dtype) -> None:
    check_against_fp64((300, 8, 2, 128, 192), form, dtype)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("form", ["swiglu", "gelu with biases"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_against_fp64(shape: tuple[int, ...], form: str) -> None:
    check_against_fp64(shape, form, BF16)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("factor", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_dropping_is_deepspeeds(k: int, factor: float) -> None:
    """Many experts, many tokens, several tiles an expert: everything equal to rounding."""
    shape = (4096, 32, k, 256, 384)
    x, grad = case(shape, BF16)
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
    x, grad = case(shape, BF16)
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
    x, grad = case(shape, BF16)
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
def test_backward_twice() -> None:
    """With a kept graph nothing saved may be overwritten."""
    shape = (300, 8, 2, 128, 192)
    x, grad = case(shape, BF16)
    layer, x = build_fused(shape, "swiglu", BF16), x.requires_grad_()
    output, _, _ = layer(x)
    wanted = [x, *layer.deepspeed_moe.experts.parameters()]
    first = torch.autograd.grad(output, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(output, wanted, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu(1)
def test_saved_weights_must_not_change() -> None:
    shape = (64, 8, 2, 128, 192)
    x, grad = case(shape, BF16)
    layer = build_fused(shape, "swiglu", BF16)
    output, _, _ = layer(x.requires_grad_())
    with torch.no_grad():
        next(layer.deepspeed_moe.experts.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified in place or moved"):
        output.backward(grad)


@pytest.mark.gpu(1)
def test_frozen_experts_and_no_grad() -> None:
    shape = (300, 8, 2, 128, 192)
    x, grad = case(shape, BF16)
    layer = build_fused(shape, "swiglu", BF16, top2_2nd_expert_sampling=False)
    expected = run(layer, x, grad)
    with torch.no_grad():
        before = torch.cuda.memory_allocated()
        output = layer(x)[0]
        kept = torch.cuda.memory_allocated() - before
        assert torch.equal(output, expected["output"])
        assert kept < 2 * output.numel() * output.element_size()  # pre-activations would be 6 times
    layer.deepspeed_moe.experts.requires_grad_(False)
    x.requires_grad_()
    output, l_aux, _ = layer(x)
    torch.autograd.backward([output, l_aux], [grad, torch.ones_like(l_aux)])
    assert torch.equal(x.grad, expected["grad of x"])


@pytest.mark.gpu(1)
def test_cuda_graph() -> None:
    """Forward and backward replay on new input."""
    shape = (512, 8, 4, 128, 192)
    layer = build_fused(shape, "swiglu", BF16, drop_tokens=True)
    x, grad = case(shape, BF16)
    static, wanted = x.clone().requires_grad_(), list(layer.parameters())

    def step() -> tuple[torch.Tensor, ...]:
        output, l_aux, _ = layer(static)
        grads = torch.autograd.grad(
            [output, l_aux], [static, *wanted], [grad, torch.ones_like(l_aux)]
        )
        return output.detach(), *grads

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        static.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [t.clone() for t in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.gpu(1)
def test_moved_parameters_are_noticed() -> None:
    """As ZeRO moves them, into one buffer."""
    shape = (300, 8, 2, 128, 192)
    x, grad = case(shape, BF16)
    layer = build_fused(shape, "swiglu with biases", BF16)
    expected = run(layer, x, grad)
    params = list(layer.deepspeed_moe.experts.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    for param, piece in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.data = piece.view_as(param)
    got = run(layer, x, grad)
    assert all(torch.equal(got[what], value) for what, value in expected.items())
    flat.zero_()
    assert layer(x)[0].count_nonzero() == 0
    for expert in layer.deepspeed_moe.experts.deepspeed_experts:
        expert.w2.bias = nn.Parameter(torch.ones_like(expert.w2.bias))
    output, _, _ = layer(x)
    torch.testing.assert_close(output, torch.ones_like(output))  # weights of a token sum to 1


def stack_grads(layer: MoE, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Run forward and backward on top of what there is; return the gradients of all stacks."""
    torch.manual_seed(7)
    layer(x)[0].backward(grad)
    return [stack.grad for stack in layer.deepspeed_moe.experts.stacks().values()]


@pytest.mark.gpu(1)
def test_uses_are_counted() -> None:
    """Only a forward that was alone all the time until its backward is a single one."""
    uses = load_kernels(torch.device("cuda", 0)).Uses()
    uses.begin()
    assert uses.is_single
    uses.begin()
    assert not uses.is_single
    uses.end()
    assert not uses.is_single
    uses.end()
    uses.begin()
    assert uses.is_single


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("form", ["swiglu", "swiglu with biases", "gelu"])
def test_kernels_add_up_micro_batches(form: str, dtype: torch.dtype) -> None:
    """To the bit as autograd adds, where nobody can see it; else autograd does."""
    shape = (300, 8, 2, 136, 200)
    (x, grad), layer = case(shape, dtype), build_fused(shape, form, dtype)
    num_matrices = sum(key.endswith("weight") for key in layer.deepspeed_moe.experts.shapes)
    alone = []
    for tokens, of_output in ((x, grad), (x * 2, grad * 3)):
        layer.zero_grad()
        alone.append([g.clone() for g in stack_grads(layer, tokens, of_output)])
    expected = [a + b for a, b in zip(*alone, strict=True)]
    handles = layer.deepspeed_moe.fused.weights.handles
    layer.zero_grad()
    stack_grads(layer, x, grad)
    layer(x)  # its graph is freed
    assert handles.num_added == 0
    got = stack_grads(layer, x * 2, grad * 3)
    assert handles.num_added == num_matrices
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    # torch.autograd.grad adds to nothing.
    stacks = list(layer.deepspeed_moe.experts.stacks().values())
    torch.manual_seed(7)
    found = torch.autograd.grad(layer(x)[0], stacks, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, alone[0], strict=True))
    assert all(torch.equal(p.grad, b) for p, b in zip(stacks, expected, strict=True))
    # Hooks get the new gradient alone.
    seen: list[torch.Tensor] = []
    hooks = [stack.register_hook(lambda g: seen.append(g.clone())) for stack in stacks]
    layer.zero_grad()
    stack_grads(layer, x, grad)
    got = stack_grads(layer, x * 2, grad * 3)
    assert handles.num_added == num_matrices
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    in_second = {id(g): g for g in seen[len(stacks) :]}.values()
    for gradient in in_second:
        assert any(gradient.shape == b.shape and torch.equal(gradient, b) for b in alone[1])


@pytest.mark.gpu(1)
def test_two_uses_in_one_graph_are_autograds() -> None:
    """Their gradients meet before they are accumulated, where none may be missing."""
    shape = (300, 8, 2, 136, 200)
    (x, grad), layer = case(shape, BF16), build_fused(shape, "swiglu", BF16)
    stacks = list(layer.deepspeed_moe.experts.stacks().values())
    alone = []
    for tokens in (x, x * 2):
        layer.zero_grad()
        alone.append([g.clone() for g in stack_grads(layer, tokens, grad)])
    torch.manual_seed(7)
    first = layer(x)[0]
    torch.manual_seed(7)
    (first + layer(x * 2)[0]).backward(grad)  # on top of the second's alone
    for stack, a, b in zip(stacks, *alone, strict=True):
        expected = [b + (a + b), b + (b + a)]
        assert any(torch.equal(stack.grad, e) for e in expected)
    assert layer.deepspeed_moe.fused.weights.handles.num_added == 0


@pytest.mark.gpu(1)
def test_launches_refuse_other_tensors() -> None:
    """Every tensor of a launch is checked, and named with what it must be."""
    shape = (64, 8, 2, 128, 192)
    (x, _), layer = case(shape, BF16), build_fused(shape, "swiglu", BF16)
    layer(x)
    fused, gate = layer.deepspeed_moe.fused, layer.deepspeed_moe.gate
    x, call = fused.begin(x, None, (64,), gate)
    routing = gate.route(x)
    message = r"topk_weights must be contiguous Float \[64, 2\] on a CUDA device, got "
    for wrong, got in (
        (routing.topk_weights.double(), r"Double \[64, 2\] on cuda:0"),
        (routing.topk_weights[:, :1], r"Float \[64, 1\] on cuda:0"),
        (routing.topk_weights.cpu(), r"Float \[64, 2\] on cpu"),
    ):
        with pytest.raises(ValueError, match=message + got):
            fused.run(routing._replace(topk_weights=wrong), call)


@pytest.mark.gpu(1)
def test_copies() -> None:
    """A copy of a layer that has run runs, with parameters of its own."""
    shape = (64, 8, 2, 128, 192)
    x, grad = case(shape, BF16)
    layer = build_fused(shape, "swiglu", BF16)
    expected = run(layer, x, grad)
    with torch.no_grad():  # leaves an l_aux behind that can be copied
        layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad():
            for param in layer.deepspeed_moe.experts.parameters():
                param.add_(1)
        got = run(twin, x, grad)
        assert all(torch.equal(got[what], value) for what, value in expected.items())
        with torch.no_grad():
            for param in layer.deepspeed_moe.experts.parameters():
                param.sub_(1)


@pytest.mark.gpu(1)
def test_misaligned_input() -> None:
    """A view that starts anywhere in its storage, also for the gradient."""
    shape = (300, 8, 2, 128, 192)
    x, grad = case(shape, BF16)
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
def test_refused(name: str) -> None:
    """Pinned it is an error; else the pipelined path takes over, says why, and is right."""
    change, phrase = REFUSED[name]
    shape = (64, 8, 2, 128, 192)
    results = []
    for block in ({"path": "fused"}, {}, {"path": "reference"}):
        layer = build_fused(shape, "swiglu", BF16, comet_ds=block)
        change(layer)
        x, grad = case(shape, next(layer.parameters()).dtype)
        if block == {"path": "fused"}:
            with pytest.raises(RuntimeError, match=f'"fused" is pinned and cannot run: .*{phrase}'):
                layer(x)
            continue
        results.append(run(layer, x, grad))
        if not block:
            assert layer.deepspeed_moe.path == "pipelined"
            assert phrase in layer.deepspeed_moe._reason
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


def test_pinned_with_expert_parallelism(world) -> None:
    for answer in world(2).run(check_pinned):
        assert "cannot run: it needs a CUDA device, not cpu" in answer


def check_pinned(rank: int, size: int) -> str:
    layer = build(MoE, rank, ep_size=size, parallel=True, comet_ds={"path": "fused"})
    try:
        layer(torch.randn(4, 16))
    except RuntimeError as error:
        return str(error)
    return "no error"
