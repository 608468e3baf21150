# SPDX-License-Identifier: Apache-2.0
"""The only place with tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

# DeepSpeed and comet_ds compute the same products; only the order of sums differs. In bf16 a ReLU
# whose input rounds to the other side of zero takes a token's share of a gradient with it.
PARITY = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# Error against fp64, relative to that of the same-dtype DeepSpeed layer.
ERROR_RATIO = 1.5
# Loss curves of a few steps of a run that was resumed from the other layer's checkpoint. With
# permuted states they are off by 15% from the second step.
RESUMED = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
# Loss curves of stacked and unstacked experts where norms of parameters are added up.
CLIPPED = 2e-7
# Loss curves of a whole training run, relative to what one rounding error in every input makes of
# the reference's: how far roundings grow depends on the model, the data and the processor.
CURVE_NOISE = 4


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return |got - expected| / |expected|, in fp64; 0 where both are zero."""
    got, expected = got.double(), expected.double()
    difference = torch.linalg.vector_norm(got - expected).item()
    norm = torch.linalg.vector_norm(expected).item()
    return difference / norm if norm else difference


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    """Assert shape, dtype and values equal to rounding; name the worst entry."""
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    error = relative_error(got, expected)
    limit = PARITY.get(expected.dtype, 0)  # integers are equal
    if not error <= limit:
        worst = (got.double() - expected.double()).abs().flatten().argmax().item()
        pair = got.flatten()[worst].item(), expected.flatten()[worst].item()
        raise AssertionError(
            f"{what}: relative error {error:.1e} > {limit:.1e}, worst at {worst}: {pair}"
        )
