# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of each token's rows, forward and backward, as CUDA kernels and in plain PyTorch.

Both versions sum a token's routes in order of k, in fp32 (fp64 for fp64 rows), round once at the
end and use no atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from comet_ds.kernels import Kernels, current_stream, load_kernels

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType in csrc


def sum_rows(rows: Tensor, row_of_route: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return out[t] = sum over k of weights[t, k] * rows[row_of_route[t, k]].

    Args:
        rows: [R, H] floating point, contiguous.
        row_of_route: [T, K] int64, contiguous; -1 = dropped, contributes nothing.
        weights: [T, K] fp32, contiguous, or None for 1.

    Returns:
        [T, H] in rows' dtype.
    """
    kernels = _kernels_for(rows)
    if kernels is None:
        total = rows.new_zeros(row_of_route.shape[0], rows.shape[1], dtype=_wide(rows.dtype))
        for k, route in enumerate(_routes(rows, row_of_route)):
            total.add_(route) if weights is None else total.addcmul_(route, weights[:, k : k + 1])
        return total.to(rows.dtype)
    output = rows.new_empty(row_of_route.shape[0], rows.shape[1])
    _launch(kernels.combine_forward, rows, row_of_route, weights, output)
    return output


def sum_rows_backward(
    grad: Tensor, rows: Tensor, row_of_route: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``sum_rows`` with weights.

    Args:
        grad: [T, H] in rows' dtype, contiguous.
        rows, row_of_route, weights: as in ``sum_rows``.

    Returns:
        grad_rows: [R, H] in rows' dtype; undefined for rows that belong to no route.
        grad_weights: [T, K] fp32.
    """
    kernels = _kernels_for(rows)
    if kernels is None:
        grad = grad.to(_wide(grad.dtype))
        columns = [(grad * route).sum(dim=1) for route in _routes(rows, row_of_route)]
        num_rows = rows.shape[0]
        grad_rows = rows.new_empty(num_rows + 1, rows.shape[1])  # the last for dropped routes
        for k, column in enumerate(row_of_route.unbind(dim=1)):
            target = torch.where(column < 0, num_rows, column)
            grad_rows.index_copy_(0, target, (grad * weights[:, k : k + 1]).to(rows.dtype))
        return grad_rows[:num_rows], torch.stack(columns, dim=1).to(weights.dtype)
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    tensors = (weights, grad, grad_rows, grad_weights)
    _launch(kernels.combine_backward, rows, row_of_route, *tensors)
    return grad_rows, grad_weights


def describe(rows: Tensor) -> str:
    """Name the version that runs for rows of this dtype and device, for the log line."""
    return "CUDA row kernels" if _kernels_for(rows) is not None else "PyTorch row operations"


def _launch(
    kernel: Callable[..., None], rows: Tensor, row_of_route: Tensor, *tensors: Tensor | None
) -> None:
    """Launch a kernel of csrc/bindings.cpp on the current stream of the rows' device."""
    kernel(
        *(0 if t is None else t.data_ptr() for t in (rows, row_of_route, *tensors)),
        *row_of_route.shape,
        rows.shape[1],
        DTYPE_CODES[rows.dtype],
        current_stream(rows),
    )


def _kernels_for(rows: Tensor) -> Kernels | None:
    return load_kernels(rows.device) if rows.dtype in DTYPE_CODES else None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _routes(rows: Tensor, row_of_route: Tensor) -> Iterator[Tensor]:
    """Yield, for k = 0 ... K - 1, [T, H]: the row of each token's k-th route, 0 if dropped."""
    padded = F.pad(rows, (0, 0, 0, 1))
    for column in row_of_route.unbind(dim=1):
        yield padded.index_select(0, torch.where(column < 0, rows.shape[0], column))
