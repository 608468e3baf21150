# SPDX-License-Identifier: Apache-2.0
"""The op builder: compiles csrc for Hopper at first use, through DeepSpeed's JIT."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder
from torch.utils.cpp_extension import CUDA_HOME

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPUTE_CAPABILITY = (9, 0)


class CometMoEBuilder(CUDAOpBuilder):
    """Builds the CUDA kernels of comet_ds.

    ``load()`` compiles with ninja into torch's extension folder ($TORCH_EXTENSIONS_DIR, else
    ~/.cache/torch_extensions), once for all processes of a machine, and returns the module.
    """

    BUILD_VAR = "DS_BUILD_COMET_MOE"
    NAME = "comet_ds_moe"

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        """Return the module's import name."""
        return f"comet_ds.{self.NAME}"

    def sources(self) -> list[str]:
        """Return absolute paths: DeepSpeed resolves others against its own package."""
        return [str(CSRC / "bindings.cpp"), *map(str, sorted((CSRC / "moe").glob("*.cu")))]

    def include_paths(self) -> list[str]:
        """Return the root of the include paths used in csrc."""
        return [str(CSRC)]

    def cxx_args(self) -> list[str]:
        """Return the host compiler's flags."""
        return ["-O3", "-std=c++20"]

    def nvcc_args(self) -> list[str]:
        """Return nvcc's flags: DeepSpeed's, without the --use_fast_math it adds."""
        return ["-O3", "-std=c++20", "-lineinfo", *self.compute_capability_args()]

    def compute_capability_args(self, cross_compile_archs: str | None = None) -> list[str]:
        """Return sm_90a alone, whatever TORCH_CUDA_ARCH_LIST says.

        DeepSpeed cannot parse "9.0a", and wgmma does not assemble for plain sm_90.
        """
        return ["-gencode=arch=compute_90a,code=sm_90a"]

    def why_not(self) -> str | None:
        """Return why the kernels cannot be built and run here, None where they can."""
        if not torch.cuda.is_available():
            return "no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability != COMPUTE_CAPABILITY:
            return f"the kernels need compute capability 9.0, this GPU has {capability}"
        if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
            return "nvcc not found: install the CUDA toolkit or set CUDA_HOME"
        if shutil.which("ninja") is None:
            return "ninja not found: pip install ninja"
        return None

    def is_compatible(self, verbose: bool = False) -> bool:
        """Return whether the kernels can be built and run here; say why not if asked."""
        reason = self.why_not()
        if reason is not None:
            self.error_log = reason
            if verbose:
                self.warning(f"{self.NAME}: {reason}")
        return reason is None
