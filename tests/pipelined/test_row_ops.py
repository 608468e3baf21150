# SPDX-License-Identifier: Apache-2.0
"""Row sums against loops in fp64, and the CUDA kernels against the PyTorch version."""

from __future__ import annotations

import pytest
import torch

from comet_ds.pipelined import row_ops
from comet_ds.pipelined.row_ops import sum_rows, sum_rows_backward

SHAPES: dict[str, tuple[int, int, int]] = {  # num_tokens, K, hidden
    "one token": (1, 1, 8),
    "odd width, no 16-byte vectors": (7, 3, 21),
    "K = 8": (129, 8, 2048),
    "width ends within a block's stride": (64, 2, 1000),
    "width of several strides": (5, 6, 4104),
}


def case(num_tokens: int, top_k: int, hidden: int, dtype: torch.dtype, device: str) -> tuple:
    torch.manual_seed(0)
    num_rows = num_tokens * top_k
    row_of_route = torch.randperm(num_rows).view(num_tokens, top_k)
    row_of_route[torch.rand(num_tokens, top_k) < 0.2] = -1
    rows = torch.randn(num_rows, hidden).to(dtype)
    unused = torch.ones(num_rows, dtype=torch.bool)
    unused[row_of_route[row_of_route >= 0]] = False
    rows[unused] = float("nan")  # what a dropped route's row holds must not matter
    weights, grad = torch.rand(num_tokens, top_k), torch.randn(num_tokens, hidden).to(dtype)
    return tuple(t.to(device) for t in (rows, row_of_route, weights, grad))


def loops(rows, row_of_route, weights, grad):
    rows, weights, grad = rows.double(), weights.double(), grad.double()
    output, plain = torch.zeros_like(grad), torch.zeros_like(grad)
    grad_rows, grad_weights = torch.zeros_like(rows), torch.zeros_like(weights)
    for t, k in (row_of_route >= 0).nonzero().tolist():
        row = row_of_route[t, k]
        output[t] += weights[t, k] * rows[row]
        plain[t] += rows[row]
        grad_rows[row] = weights[t, k] * grad[t]
        grad_weights[t, k] = (rows[row] * grad[t]).sum()
    return output, plain, grad_rows, grad_weights


def check(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    rows, row_of_route, weights, grad = case(*shape, dtype, device)
    output, plain, grad_rows, grad_weights = loops(rows, row_of_route, weights, grad)
    got_rows, got_weights = sum_rows_backward(grad, rows, row_of_route, weights)
    kept = row_of_route[row_of_route >= 0]
    close = torch.testing.assert_close
    close(sum_rows(rows, row_of_route, weights), output.to(dtype))
    close(sum_rows(rows, row_of_route), plain.to(dtype))
    close(got_rows[kept], grad_rows[kept].to(dtype))
    close(got_weights, grad_weights.float(), rtol=1e-5, atol=1e-3)
    assert got_weights.dtype == torch.float32 and got_rows.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pytorch_version(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(shape, dtype, "cpu")


def test_no_rows() -> None:
    empty = torch.empty(0, 4)
    dropped = torch.full((3, 2), -1)
    assert torch.equal(sum_rows(empty, dropped, torch.ones(3, 2)), torch.zeros(3, 4))
    grad_rows, grad_weights = sum_rows_backward(torch.ones(3, 4), empty, dropped, torch.ones(3, 2))
    assert grad_rows.shape == (0, 4) and torch.equal(grad_weights, torch.zeros(3, 2))


@pytest.mark.gpu(1)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert row_ops.describe(torch.empty(0, device="cuda")) == "CUDA row kernels"
    check(shape, dtype, "cuda")


@pytest.mark.gpu(1)
def test_kernels_repeat_bitwise() -> None:
    args = case(129, 8, 2048, torch.bfloat16, "cuda")
    rows, row_of_route, weights, grad = args
    kept = row_of_route[row_of_route >= 0]
    runs = []
    for _ in range(3):
        grad_rows, grad_weights = sum_rows_backward(grad, rows, row_of_route, weights)
        runs.append((sum_rows(rows, row_of_route, weights), grad_rows[kept], grad_weights))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.gpu(1)
def test_kernels_without_tokens() -> None:
    rows = torch.empty(0, 8, device="cuda")
    routes, weights = torch.empty(0, 2, dtype=torch.int64, device="cuda"), rows.new_empty(0, 2)
    assert sum_rows(rows, routes, weights).shape == (0, 8)
    assert sum_rows_backward(rows, rows, routes, weights)[1].shape == (0, 2)
