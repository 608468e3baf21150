# SPDX-License-Identifier: Apache-2.0
"""The fused path as a node of autograd's graph.

Kept graphs, frozen and moved parameters, CUDA graphs, copies, and micro-batches whose gradients the
kernels add up as autograd would.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers.fused_layers import build_fused, draw_case
from helpers.mlp_forms import BF16, FP16
from helpers.parity import run
from torch import nn

from comet_ds import MoE
from comet_ds.kernels import load_kernels


@pytest.mark.gpu(1)
def test_backward_twice() -> None:
    """With a kept graph nothing saved may be overwritten."""
    shape = (300, 8, 2, 128, 192)
    x, grad = draw_case(shape, BF16)
    layer, x = build_fused(shape, "swiglu", BF16), x.requires_grad_()
    output, _, _ = layer(x)
    wanted = [x, *layer.deepspeed_moe.experts.parameters()]
    first = torch.autograd.grad(output, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(output, wanted, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu(1)
def test_saved_weights_must_not_change() -> None:
    shape = (64, 8, 2, 128, 192)
    x, grad = draw_case(shape, BF16)
    layer = build_fused(shape, "swiglu", BF16)
    output, _, _ = layer(x.requires_grad_())
    with torch.no_grad():
        next(layer.deepspeed_moe.experts.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified in place or moved"):
        output.backward(grad)


@pytest.mark.gpu(1)
def test_frozen_experts_and_no_grad() -> None:
    shape = (300, 8, 2, 128, 192)
    x, grad = draw_case(shape, BF16)
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
    x, grad = draw_case(shape, BF16)
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
    (x, grad), layer = draw_case(shape, dtype), build_fused(shape, form, dtype)
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
    (x, grad), layer = draw_case(shape, BF16), build_fused(shape, "swiglu", BF16)
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
def test_moved_parameters_are_noticed() -> None:
    """As ZeRO moves them, into one buffer."""
    shape = (300, 8, 2, 128, 192)
    x, grad = draw_case(shape, BF16)
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


@pytest.mark.gpu(1)
def test_copies() -> None:
    """A copy of a layer that has run runs, with parameters of its own."""
    shape = (64, 8, 2, 128, 192)
    x, grad = draw_case(shape, BF16)
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
