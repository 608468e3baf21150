# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels, or why there are none."""

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

# Set to anything: kernels that can record a timeline.
TIMELINE_VARIABLE = "COMET_DS_TIMELINE"


def load_kernels(device: torch.device) -> ModuleType | None:
    """Return the functions of csrc/bindings.cpp for a device, building them at first use.

    Returns:
        None for devices other than CUDA, and, with one warning that says why, where the kernels
        cannot be built or run; callers then use PyTorch operations.
    """
    return _build()[0] if device.type == "cuda" else None


def why_no_kernels() -> str | None:
    """Return why ``load_kernels`` gives None for CUDA devices, None where it does not."""
    return _build()[1]


def use_timeline_kernels() -> None:
    """Have this process take kernels that can record what their CTAs do (``recorder.py``).

    The same as setting ``TIMELINE_VARIABLE``. Where they cannot be built, the others are taken.

    Raises:
        RuntimeError: others are loaded already.
    """
    if _build.cache_info().currsize and not os.environ.get(TIMELINE_VARIABLE):
        raise RuntimeError("the kernels are loaded already, and cannot record a timeline")
    os.environ[TIMELINE_VARIABLE] = "1"


def num_sms(device: torch.device) -> int:
    """Return how many SMs a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def current_stream(tensor: Tensor) -> int:
    """Return the address of the current stream of a tensor's device, for a launch.

    The device must be the current one: ``MOELayer.forward`` makes it so, autograd does in backward.
    (``torch.cuda.current_stream`` and a device guard take 20 us of host time a launch.)

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
    """Return a builder's module, or why there is none."""
    reason = builder.why_not()
    if reason is None:
        try:
            return builder.load(verbose=False), None
        except (RuntimeError, OSError, ImportError) as error:
            reason = f"the build failed: {error}"
    return None, reason
