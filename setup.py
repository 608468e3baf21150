# SPDX-License-Identifier: Apache-2.0
"""Package metadata. comet_ds/op_builder and comet_ds/csrc are links to the top-level folders."""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "comet_ds/__init__.py").read_text())[1]


class BuildKernels(build_ext):
    """Compiles csrc ahead of use: DS_BUILD_COMET_MOE=1 pip install --no-build-isolation ."""

    def build_extension(self, ext: Extension) -> None:
        """Let the op builder compile."""
        sys.path.insert(0, str(ROOT))
        try:
            from op_builder.comet_moe import CometMoEBuilder
        except ModuleNotFoundError as error:  # pip builds in an empty environment
            raise SystemExit(
                "DS_BUILD_COMET_MOE=1 compiles for the torch and DeepSpeed that are installed: "
                f"pip install --no-build-isolation . ({error})"
            ) from error

        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        CometMoEBuilder().compile(output)


IS_BUILT_AHEAD = os.environ.get("DS_BUILD_COMET_MOE") == "1"

setup(
    name="comet-ds",
    version=VERSION,
    description="DeepSpeed's MoE layer with communication and computation overlapped",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["comet_ds", "comet_ds.*"]),
    package_data={"comet_ds": ["py.typed", "csrc/*.*", "csrc/*/*.*"]},
    ext_modules=[Extension("comet_ds.comet_ds_moe", [])] if IS_BUILT_AHEAD else [],
    cmdclass={"build_ext": BuildKernels},
    entry_points={"console_scripts": ["comet_ds=comet_ds.__main__:main"]},
    install_requires=[
        # No upper bound: pip would replace an installed newer torch. NVIDIA's containers have
        # pre-releases. comet_ds/_compat.py lists the tested versions.
        "torch>=2.11.0.dev0",
        "deepspeed>=0.19.6,<0.20",
        "hjson",
        "ninja",
        "numpy",
        "packaging",
        "pybind11",
        "pydantic>=2",
        "wandb",
    ],
    extras_require={
        "dashboard": ["wandb-workspaces"],
        "timeline": ["matplotlib"],
        "test": [
            "basedpyright",
            "build",
            "matplotlib",
            "pytest>=8",
            "ruff",
            "setuptools>=77",
            "tensorboard",
            "wandb-workspaces",
        ],
        "examples": ["tqdm"],
    },
)
