# SPDX-License-Identifier: Apache-2.0
"""Package metadata. comet_ds/op_builder and comet_ds/csrc are links to the top-level folders."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "comet_ds/__init__.py").read_text())[1]

setup(
    name="comet-ds",
    version=VERSION,
    description="DeepSpeed's MoE layer with communication and computation overlapped",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["comet_ds", "comet_ds.*"]),
    package_data={"comet_ds": ["csrc/*.cpp", "csrc/*/*.h", "csrc/*/*.cu", "csrc/*/*.cuh"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.6,<0.20",
        "hjson",
        "ninja",
        "numpy",
        "pybind11",
        "pydantic>=2",
        "wandb",
    ],
    extras_require={
        "test": ["build", "pytest>=8", "ruff", "setuptools>=77", "tensorboard"],
        "examples": ["tqdm"],
    },
)
