# SPDX-License-Identifier: Apache-2.0
"""The op builder: compiles csrc for Hopper, at first use through DeepSpeed's JIT or at install."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder
from torch.utils.cpp_extension import CUDA_HOME, _get_build_directory
from torch.utils.cpp_extension import include_paths as torch_includes

from .locks import compiling

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPUTE_CAPABILITY = (9, 0)
# The oldest toolkit with everything csrc uses (cudaGetDriverEntryPointByVersion).
OLDEST_CUDA = (12, 5)
MISMATCH = "was compiled for another torch or from other sources"


class CometMoEBuilder(CUDAOpBuilder):
    """Builds the CUDA kernels of comet_ds and the autograd nodes that launch them.

    ``load()`` returns the module that the installation compiled (``DS_BUILD_COMET_MOE=1 pip install
    .``) if it matches the sources. Otherwise it compiles with ninja into torch's extension folder
    ($TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions), once for all processes of a machine: the
    others wait for a lock, which the system releases when the compiling process ends.
    """

    BUILD_VAR = "DS_BUILD_COMET_MOE"
    NAME = "comet_ds_moe"

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        """Return the module's import name."""
        return f"comet_ds.{self.NAME}"

    def sources(self) -> list[str]:
        """Return absolute paths; DeepSpeed resolves relative ones against its own package."""
        return [str(path) for path in sorted((*CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")))]

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

    def fingerprint(self) -> str:
        """Return a digest of the sources, the flags and torch's version.

        A compiled module contains its own. torch's version counts because a module calls torch's
        C++ interface.
        """
        basis = self.cxx_args(), self.nvcc_args(), torch.__version__
        digest = hashlib.sha256(repr(basis).encode())
        for path in sorted(p for p in CSRC.rglob("*") if p.is_file()):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def compile(self, output: Path) -> None:
        """Compile ahead of use, without a GPU, for the installed torch.

        Args:
            output: path of the shared library to write.

        Raises:
            RuntimeError: there is no compiler, or it fails; has the compiler's message.
        """
        if reason := self._why_no_compiler():
            raise RuntimeError(f"{self.NAME} cannot be compiled: {reason}")
        nvcc = find_nvcc() or "nvcc"
        includes = [str(CSRC), *torch_includes(), sysconfig.get_path("include")]
        include_flags = [flag for path in includes for flag in ("-I", path)]
        macros = [
            f"-DTORCH_EXTENSION_NAME={self.NAME}",
            f'-DCOMET_FINGERPRINT="{self.fingerprint()}"',
        ]
        if torch.version.cuda is None:  # without a header that only torch for CUDA has
            macros.append("-DC10_USING_CUSTOM_GENERATED_MACROS")
        folder = output.with_suffix(".objects")
        folder.mkdir(parents=True, exist_ok=True)

        def compile_source(source: str) -> str:
            target = str(folder / Path(source).with_suffix(".o").name)
            flags = [*self.nvcc_args(), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            _run([nvcc, *flags, *macros, *include_flags, "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_source, self.sources()))
        torch_folder = Path(torch.__file__).parent / "lib"
        names = "c10", "torch", "torch_cpu", "torch_python", "c10_cuda"
        libraries = [f"-l{n}" for n in names if (torch_folder / f"lib{n}.so").exists()]
        flags = ["-shared", "-cudart", "static", "-L", str(torch_folder), *libraries]
        _run([nvcc, *objects, *flags, "-o", str(output)])
        shutil.rmtree(folder)

    def prebuilt(self) -> Path | None:
        """Return the path of the module that the installation compiled, None if it did not."""
        spec = importlib.util.find_spec("comet_ds")
        for folder in (spec and spec.submodule_search_locations) or ():
            path = Path(folder) / f"{self.NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
            if path.exists():
                return path
        return None

    def fits(self, path: Path) -> bool:
        """Return whether a module was compiled from these sources and for this torch.

        Searches the file for the fingerprint: a module for another torch may crash when loaded.
        """
        return self.fingerprint().encode() in path.read_bytes()

    def load(self, verbose: bool = True) -> ModuleType:
        """Return the module; compile it first if necessary."""
        path = self.prebuilt()
        if path and self.fits(path):
            spec = importlib.util.spec_from_file_location(self.NAME, path)
            assert spec is not None and spec.loader is not None, "a module's file has both"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        if path:
            self.warning(f"{path} {MISMATCH}; compiling again")
        start = time.perf_counter()
        with compiling(self.build_folder(), self.warning):
            module = cast(ModuleType, super().load(verbose))  # DeepSpeed annotates nothing
        vars(module)["fingerprint"] = self.fingerprint()
        if (seconds := time.perf_counter() - start) > 2:  # a cached module takes less
            self.warning(f"compiled the kernels of comet_ds in {seconds:.0f} s")
        return module

    def build_folder(self) -> Path:
        """Return the folder in which the first use compiles; create it if necessary."""
        return Path(_get_build_directory(self.NAME, verbose=False))

    def why_not(self) -> str | None:
        """Return why the kernels cannot be built and run here, None if they can."""
        if not torch.cuda.is_available():
            return "no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability != COMPUTE_CAPABILITY:
            return f"the kernels need compute capability 9.0, this GPU has {capability}"
        path = self.prebuilt()
        if path and self.fits(path):
            return None
        reason = self._why_no_compiler() or self._why_no_first_use()
        return f"{path} {MISMATCH}, and {reason}" if path and reason else reason

    @staticmethod
    def _why_no_compiler() -> str | None:
        if find_nvcc() is None:
            return "nvcc not found: install the CUDA toolkit or set CUDA_HOME"
        try:
            version = cuda_version()
        except RuntimeError as error:
            return str(error)
        if version < OLDEST_CUDA:
            return f"nvcc {version[0]}.{version[1]} is too old: the kernels need CUDA 12.5"
        compiler = next(iter(shlex.split(os.environ.get("CXX", ""))), "c++")
        if shutil.which(compiler) is None:
            return f"C++ compiler {compiler} not found: install g++ or set CXX"
        return None

    @staticmethod
    def _why_no_first_use() -> str | None:
        nvcc_major, torch_cuda = cuda_version()[0], torch.version.cuda or "none"
        if str(nvcc_major) != torch_cuda.split(".")[0]:
            return f"nvcc is of CUDA {nvcc_major}, torch of CUDA {torch_cuda}: install one to match"
        if shutil.which("ninja") is None:
            return "ninja not found: pip install ninja"
        return None

    def is_compatible(self, verbose: bool = False) -> bool:
        """Return whether the kernels can be built and run here; print the reason if verbose."""
        reason = self.why_not()
        if reason is not None:
            self.error_log = reason
            if verbose:
                self.warning(f"{self.NAME}: {reason}")
        return reason is None


class TimelineBuilder(CometMoEBuilder):
    """Builds kernels that record a timeline of their CTAs (``comet_ds timeline``)."""

    NAME = "comet_ds_moe_timeline"

    def cxx_args(self) -> list[str]:
        """Return the host compiler's flags."""
        return [*super().cxx_args(), "-DCOMET_TIMELINE=1"]

    def nvcc_args(self) -> list[str]:
        """Return nvcc's flags."""
        return [*super().nvcc_args(), "-DCOMET_TIMELINE=1"]

    def fingerprint(self) -> str:
        """Return the normal kernels' fingerprint: their tuning results apply here as well."""
        return CometMoEBuilder().fingerprint()


def find_nvcc() -> str | None:
    """Return the path of torch's nvcc; of the one on the PATH if torch has no CUDA toolkit."""
    if CUDA_HOME is None:
        return shutil.which("nvcc")
    nvcc = Path(CUDA_HOME) / "bin" / "nvcc"
    return str(nvcc) if nvcc.exists() else None


def cuda_version() -> tuple[int, int]:
    """Return nvcc's version.

    Raises:
        RuntimeError: nvcc does not run, or does not print its version.
    """
    nvcc = find_nvcc() or "nvcc"
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{nvcc} does not run: {error}") from error
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"{nvcc} --version does not print a version: {done.stderr.strip()}")
    return int(found[1]), int(found[2])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
