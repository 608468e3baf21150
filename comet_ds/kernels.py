# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels, or why there are none."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from deepspeed.utils import logger


def load_kernels(device: torch.device) -> ModuleType | None:
    """Return the functions of csrc/bindings.cpp for a device, building them at first use.

    Returns:
        None for devices other than CUDA, and, with one warning that says why, where the kernels
        cannot be built or run; callers then use PyTorch operations.
    """
    return _build() if device.type == "cuda" else None


@functools.cache
def _build() -> ModuleType | None:
    from comet_ds.op_builder.comet_moe import CometMoEBuilder

    builder = CometMoEBuilder()
    reason = builder.why_not()
    if reason is None:
        try:
            return builder.load(verbose=False)
        except (RuntimeError, OSError, ImportError) as error:
            reason = f"the build failed: {error}"
    logger.warning(f"comet_ds: PyTorch operations instead of CUDA kernels: {reason}")
    return None
