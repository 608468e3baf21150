# SPDX-License-Identifier: Apache-2.0
"""Loading the compiled CUDA kernels, and two queries of the device."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from deepspeed.utils import logger
from torch import Tensor

if TYPE_CHECKING:
    from comet_ds.op_builder.comet_moe import CometMoEBuilder

# Environment variable; with any value, the kernels that record a timeline are loaded.
TIMELINE_VARIABLE = "COMET_DS_TIMELINE"


def load_kernels(device: torch.device) -> ModuleType | None:
    """Return the functions of csrc/bindings.cpp for a device; the first call builds them.

    Returns:
        None for devices other than CUDA. Also None, after one warning with the reason, if the
        kernels cannot be built or run; callers then use PyTorch operations.
    """
    return _build()[0] if device.type == "cuda" else None


def why_no_kernels() -> str | None:
    """Return why ``load_kernels`` gives None for CUDA devices, None if it gives the kernels."""
    return _build()[1]


def use_timeline_kernels() -> None:
    """Make this process load the kernels that record a timeline of their CTAs.

    Sets ``TIMELINE_VARIABLE``. If those kernels cannot be built, the normal ones are loaded.

    Raises:
        RuntimeError: the normal kernels are loaded already.
    """
    if _build.cache_info().currsize and not os.environ.get(TIMELINE_VARIABLE):
        raise RuntimeError("the kernels are loaded already, and cannot record a timeline")
    os.environ[TIMELINE_VARIABLE] = "1"


def num_sms(device: torch.device) -> int:
    """Return the number of SMs of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_stream(tensor: Tensor) -> int:
    """Return the address of the current stream of a tensor's device, for a kernel launch.

    The tensor's device must be the current one: ``MOELayer.forward`` and, in backward, autograd set
    it. (``torch.cuda.current_stream`` with a device guard takes 20 us of host time per launch.)

    Raises:
        RuntimeError: another device is the current one.
    """
    device, current = tensor.get_device(), torch._C._cuda_getDevice()
    if device != current:
        raise RuntimeError(f"the current CUDA device must be {device}, the tensor's, not {current}")
    return torch._C._cuda_getCurrentRawStream(device)


@functools.cache
def _build() -> tuple[ModuleType | None, str | None]:
    from comet_ds.op_builder.comet_moe import CometMoEBuilder, TimelineBuilder

    if os.environ.get(TIMELINE_VARIABLE):
        module, reason = _load(TimelineBuilder())
        if module is not None:
            return module, None
        logger.warning(f"comet_ds: no kernels that record a timeline: {reason}")
    module, reason = _load(CometMoEBuilder())
    if module is None:
        logger.warning(f"comet_ds: PyTorch operations instead of CUDA kernels: {reason}")
    return module, reason


def _load(builder: CometMoEBuilder) -> tuple[ModuleType | None, str | None]:
    """Return a builder's module and None, or None and the reason."""
    reason = builder.why_not()
    if reason is None:
        try:
            return builder.load(verbose=False), None
        except (RuntimeError, OSError, ImportError) as error:
            reason = f"the build failed: {error}"
    return None, reason
