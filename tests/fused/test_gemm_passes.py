# SPDX-License-Identifier: Apache-2.0
"""Every pass of the grouped GEMM by itself, against fp64 on the same inputs.

The kernel's error is at most 1.5 times that of PyTorch's products in the same dtype. Rows are
sorted by expert and padded with zeros to blocks of 128 (``comet_ds.fused.call``). What lies behind
the last expert's rows is NaN here, so that no pass may read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers.fused_layers import Shape, build_fused, draw_case
from helpers.mlp_forms import BF16, FORMS, FP16
from helpers.tolerance import assert_as_accurate
from torch import Tensor, nn

from comet_ds.experts.mlp import ACTIVATIONS, ExpertMLP
from comet_ds.fused.call import CallSizes, plan_of, prepare_call
from comet_ds.fused.peer.layout import TABLES

pytestmark = pytest.mark.gpu(1)

MEDIUM: Shape = (300, 8, 2, 128, 192)  # num_tokens, num_experts, k, hidden, ffn
CASES: dict[str, tuple[Shape, str, torch.dtype]] = {
    "one token": ((1, 8, 2, 64, 96), "swiglu", BF16),
    "experts without tokens": ((7, 8, 1, 200, 136), "swiglu", BF16),
    "sizes that end within a tile": ((129, 12, 6, 1032, 72), "swiglu", BF16),
    "several blocks of rows an expert": ((1024, 3, 1, 256, 256), "swiglu", BF16),
    "sums longer than the ring of stages": ((300, 4, 2, 2048, 1408), "swiglu", BF16),
    "two matrices, several blocks": ((1024, 3, 1, 256, 256), "gelu with biases", BF16),
    "two matrices, within a tile": ((129, 12, 6, 1032, 72), "gelu with biases", BF16),
    **{form: (MEDIUM, form, BF16) for form in FORMS},
    "fp16, gated": (MEDIUM, "swiglu", FP16),
    "fp16, gated with biases": (MEDIUM, "swiglu with biases", FP16),
    "fp16, two matrices": (MEDIUM, "gelu with biases", FP16),
}


class Passes:
    """The launches of a layer that has dispatched its tokens, and formulas for what they compute.

    Attributes:
        call: LayerCall of csrc/autograd/layer_bindings.cpp.
        mlps: the experts.
        offsets: [E + 1] first row of every expert.
        rows: [R, H], the tokens by expert.
        row_weights: [R] fp32, the routing weight of every row; 0 in padding.
    """

    def __init__(self, shape: Shape, form: str, dtype: torch.dtype) -> None:
        num_tokens, num_experts, top_k, self.hidden, self.ffn = shape
        self.layer, self.dtype = build_fused(shape, form, dtype), dtype
        self.tokens, _ = draw_case(shape, dtype)
        self.layer(self.tokens)
        moe = self.layer.deepspeed_moe
        weights = moe.fused.weights
        self.mlps: Sequence[ExpertMLP] = weights.mlps
        sizes = CallSizes((num_tokens,), None, top_k, num_experts)
        prepared = prepare_call(weights, sizes)
        self.call, self.num_rows = prepared.launches.forward, prepared.max_rows
        self.workspace = torch.empty(self.call.workspace_bytes, dtype=torch.uint8, device="cuda")
        self.routing = {name: getattr(moe.routing, name) for name in TABLES}
        self.grad_weights = torch.empty(num_tokens, top_k, device="cuda")
        self.rows = self.unwritten(self.hidden)
        self.forward("dispatch", hidden=self.unwritten(self.ffn))
        plan = plan_of(self.call, self.workspace)
        self.offsets = plan["expert_offsets"].tolist()
        self.row_weights = plan["row_weights"]
        self.is_padding = plan["token_of_row"][: self.offsets[-1]] < 0

    @property
    def num_first(self) -> int:
        """Matrices before the activation: gate and up, or up."""
        return 1 + (self.mlps[0].gate is not None)

    def unwritten(self, cols: int) -> Tensor:
        return torch.full((self.num_rows, cols), torch.nan, dtype=self.dtype, device="cuda")

    def draw(self, cols: int) -> Tensor:
        """Return [R, cols] random rows: zero in padding, NaN behind the last expert's."""
        found, end = self.unwritten(cols), self.offsets[-1]
        found[:end] = torch.randn(end, cols, device="cuda").to(self.dtype)
        found[:end][self.is_padding] = 0
        return found

    def forward(
        self,
        part: str,
        *,
        hidden: Tensor,
        pre: Sequence[Tensor] = (),
        results: Tensor | None = None,
    ) -> None:
        self.call.forward(
            **self.routing,
            tokens=self.tokens,
            workspace=self.workspace,
            rows=self.rows,
            hidden=hidden,
            pre=pre,
            results=self.unwritten(self.hidden) if results is None else results,
            output=torch.empty_like(self.tokens),
            part=part,
        )

    def activate(self, pre: Sequence[Tensor]) -> Tensor:
        first = ACTIVATIONS[self.mlps[0].activation](pre[0])
        return first * pre[1] if len(pre) == 2 else first

    def slices(self) -> list[tuple[ExpertMLP, slice]]:
        starts = zip(self.offsets, self.offsets[1:], strict=False)
        return [(m, slice(*rows)) for m, rows in zip(self.mlps, starts, strict=True)]

    def check(
        self, got: dict[str, Tensor], formula: Callable[[torch.dtype], Sequence[Tensor]]
    ) -> None:
        """Compare results with a formula's in fp64 and in the layer's dtype, in this order."""
        results = zip(got.items(), formula(self.dtype), formula(torch.float64), strict=True)
        for (what, ours), theirs, truth in results:
            assert_as_accurate(ours, theirs, truth, what)

    def check_rows(
        self, got: dict[str, Tensor], formula: Callable[[torch.dtype], Sequence[Tensor]]
    ) -> None:
        """The same of [R, ...] results, up to the last expert's rows."""
        self.check({what: t[: self.offsets[-1]] for what, t in got.items()}, formula)


def firsts(mlp: ExpertMLP) -> list[nn.Linear]:
    return [linear for linear in (mlp.gate, mlp.up) if linear is not None]


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    """Apply a module in the dtype of x."""
    bias = None if module.bias is None else module.bias.detach().to(x.dtype)
    return F.linear(x, module.weight.detach().to(x.dtype), bias)


def by_row(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Join the results of all experts."""
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def names(passes: Passes, what: str) -> list[str]:
    return [f"{what} of gate", f"{what} of up"][-passes.num_first :]


@pytest.fixture(scope="module", params=list(CASES))
def passes(request: pytest.FixtureRequest) -> Passes:
    return Passes(*CASES[request.param])


def test_up_and_activation(passes: Passes) -> None:
    """pre = x W^T + bias of gate and up, h = act(pre_gate) pre_up; of one matrix h = act(pre)."""
    hidden = passes.unwritten(passes.ffn)
    pre = [passes.unwritten(passes.ffn) for _ in range(passes.num_first)]
    passes.forward("up", hidden=hidden, pre=pre)

    def formula(dtype: torch.dtype) -> list[Tensor]:
        parts = []
        for mlp, rows in passes.slices():
            found = [linear(passes.rows[rows].to(dtype), module) for module in firsts(mlp)]
            parts.append((passes.activate(found), *found))
        return by_row(parts)

    keys = ("h", *names(passes, "pre-activation"))
    passes.check_rows(dict(zip(keys, (hidden, *pre), strict=True)), formula)
    without = passes.unwritten(passes.ffn)
    passes.forward("up", hidden=without)  # as where there is no backward
    end = passes.offsets[-1]
    assert torch.equal(without[:end], hidden[:end]), "h differs where pre is not saved"


def test_down(passes: Passes) -> None:
    """y = h W^T + bias."""
    hidden, results = passes.draw(passes.ffn), passes.unwritten(passes.hidden)
    passes.forward("down", hidden=hidden, results=results)

    def formula(dtype: torch.dtype) -> list[Tensor]:
        return by_row([[linear(hidden[rows].to(dtype), m.down)] for m, rows in passes.slices()])

    passes.check_rows({"y": results}, formula)


def test_gradient_of_down_and_activation(passes: Passes) -> None:
    """dh = dy W; from it, with w the rows' routing weights: w h, dpre = w dh h'(pre), <dh, h>."""
    grad_rows, pre = passes.draw(passes.hidden), [passes.draw(passes.ffn) for _ in range(2)]
    pre = pre[: passes.num_first]

    def launch(saved: Sequence[Tensor], grad_pre: Sequence[Tensor]) -> dict[str, Tensor]:
        weighted_hidden = passes.unwritten(passes.ffn)
        num_dots = passes.call.num_row_dots  # one a tile of columns
        row_dots = torch.full((num_dots, passes.num_rows), torch.nan, device="cuda")
        passes.call.backward_down(
            grad=passes.tokens,
            workspace=passes.workspace,
            grad_rows=grad_rows,
            pre=saved,
            grad_pre=grad_pre,
            weighted_hidden=weighted_hidden,
            row_dots=row_dots,
            grad_weights=passes.grad_weights,
            only_gemm=True,
        )
        keys = ("w h", *names(passes, "gradient"), "<dh, h>")
        return dict(zip(keys, (weighted_hidden, *grad_pre, row_dots.sum(0)), strict=True))

    def formula(dtype: torch.dtype) -> list[Tensor]:
        parts = []
        for mlp, rows in passes.slices():
            leaves = [t[rows].to(dtype).detach().requires_grad_() for t in pre]
            weights = passes.row_weights[rows, None].to(dtype)
            hidden = passes.activate(leaves)
            grad = grad_rows[rows].to(dtype) @ mlp.down.weight.detach().to(dtype)
            grads = torch.autograd.grad(hidden, leaves, weights * grad)
            hidden = hidden.detach()
            parts.append((weights * hidden, *grads, (grad * hidden).sum(1)))
        return by_row(parts)

    got = launch(pre, [passes.unwritten(passes.ffn) for _ in pre])
    passes.check_rows(got, formula)
    in_place = [t.clone() for t in pre]  # gradients may take the place of what was saved
    for what, value in launch(in_place, in_place).items():
        end = passes.offsets[-1]
        assert torch.equal(value[:end], got[what][:end]), f"{what} differs in place"


def test_gradient_of_up(passes: Passes) -> None:
    """dx = dpre_gate W_gate + dpre_up W_up; of one matrix dpre W."""
    grad_pre = [passes.draw(passes.ffn) for _ in range(passes.num_first)]
    grad_rows = passes.unwritten(passes.hidden)
    passes.call.backward_up(
        workspace=passes.workspace,
        grad_pre=grad_pre,
        rows=passes.rows,
        grad_rows=grad_rows,
        only_gemm=True,
    )

    def formula(dtype: torch.dtype) -> list[Tensor]:
        parts = []
        for mlp, rows in passes.slices():
            modules = zip(grad_pre, firsts(mlp), strict=True)
            terms = [g[rows].to(dtype) @ m.weight.detach().to(dtype) for g, m in modules]
            parts.append([sum(terms)])
        return by_row(parts)

    passes.check_rows({"dx": grad_rows}, formula)


def check_weight_grad(passes: Passes, a: Tensor, b: Tensor, is_down: bool, adds: bool) -> None:
    """grad[e] = a^T b over the rows of expert e, on top of what is there where it adds.

    The bias' gradient, written by a kernel behind, is the sum of a's rows: of down, weighted.
    """
    num_experts, device = len(passes.mlps), a.device
    before = torch.randn(num_experts, a.shape[1], b.shape[1], device=device).to(passes.dtype)
    grad = before.clone() if adds else torch.full_like(before, torch.nan)
    grad_bias = torch.full_like(grad[:, :, 0], torch.nan).contiguous()
    passes.call.weight_grad(
        workspace=passes.workspace,
        a=a,
        b=b,
        grad=grad,
        grad_bias=grad_bias,
        adds=adds,
        is_down=is_down,
    )

    def formula(dtype: torch.dtype) -> list[Tensor]:
        matrices, biases = [], []
        for i, (_, rows) in enumerate(passes.slices()):
            left, right = a[rows].to(dtype), b[rows].to(dtype)
            product = left.t() @ right
            matrices.append(before[i].to(dtype) + product if adds else product)
            weights = passes.row_weights[rows, None].to(dtype) if is_down else 1
            biases.append((weights * left).sum(0))
        return [torch.stack(matrices), torch.stack(biases)]

    passes.check({"gradient of the weight": grad, "gradient of the bias": grad_bias}, formula)


ADDS = pytest.mark.parametrize("adds", [False, True], ids=["written", "added to a gradient"])


@ADDS
def test_weight_gradient_of_up(passes: Passes, adds: bool) -> None:
    """dW = dpre^T x."""
    check_weight_grad(passes, passes.draw(passes.ffn), passes.rows, is_down=False, adds=adds)


@ADDS
def test_weight_gradient_of_down(passes: Passes, adds: bool) -> None:
    """dW = dy^T (w h), whose second factor holds the routing weights."""
    a, b = passes.draw(passes.hidden), passes.draw(passes.ffn)
    check_weight_grad(passes, a, b, is_down=True, adds=adds)
