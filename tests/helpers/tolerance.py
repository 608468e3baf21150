# SPDX-License-Identifier: Apache-2.0
"""The only place with tolerances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# DeepSpeed and comet_ds compute the same products; only the order of sums differs. In bf16 a ReLU
# whose input rounds to the other side of zero takes a token's share of a gradient with it.
PARITY = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
# Error against fp64, relative to that of the same-dtype DeepSpeed layer.
ERROR_RATIO = 1.5
# Loss curves of a whole training run, relative to what one rounding error in every input makes of
# the reference's: how far roundings grow depends on the model, the data and the processor.
CURVE_NOISE = 4
# On GPUs, where sums are in no fixed order, means of the first and the last ten losses may differ
# by this, too.
CURVE_ENDS = 1e-2, 3e-2
# The same of three to six steps, as of a run that was resumed. By chance, all of so few numbers may
# be next to equal with noise: one in 16 such runs is 10 times closer than another, one in 160 is
# 100 times. However much noise there is: with permuted optimizer states, losses are off by 15%.
FEW_STEPS_NOISE, FEW_STEPS_LIMIT = 100, 3e-2


def worst(got: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference between two loss curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def assert_few_steps(
    got: Sequence[float], expected: Sequence[float], noisy: Sequence[float], what: str
) -> None:
    """Assert that losses of a few steps are the same but for rounding.

    Args:
        noisy: as expected, with one rounding error in every input; see ``batches``.
    """
    difference = worst(got, expected)
    noise = max(worst(noisy, expected), torch.finfo(torch.float32).eps)
    limit = min(FEW_STEPS_NOISE * noise, FEW_STEPS_LIMIT)
    print(f"{what}: {difference:.1e}, {difference / noise:.2f} times the noise")
    assert difference <= limit, (
        f"{what}: losses differ by {difference:.1e}, more than {limit:.1e}; rounding alone makes "
        f"{noise:.1e}: {got}, expected {expected}"
    )


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


def assert_as_accurate(got: Tensor, same_dtype: Tensor, truth: Tensor, what: str) -> None:
    """Assert that an error against fp64 is at most 1.5 times that of a computation in one dtype.

    Args:
        got: what is tested.
        same_dtype: what PyTorch or DeepSpeed computes in the same dtype.
        truth: in fp64.
        what: begins the message, which names the worst entry.
    """
    assert got.shape == truth.shape, f"{what}: shape {got.shape}, expected {truth.shape}"
    error, reference = relative_error(got, truth), relative_error(same_dtype, truth)
    if not error <= ERROR_RATIO * reference:
        worst = (got.double() - truth).abs().nan_to_num(torch.inf).flatten().argmax().item()
        values = [t.flatten()[worst].item() for t in (got, same_dtype, truth)]
        raise AssertionError(
            f"{what}: relative error {error:.1e} > {ERROR_RATIO} * {reference:.1e}, worst at "
            f"{worst}: {values[0]}, in the same dtype {values[1]}, in fp64 {values[2]}"
        )
