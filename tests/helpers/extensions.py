# SPDX-License-Identifier: Apache-2.0
"""The folder where a test run compiles extensions: its own, so that no other run's locks count."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import deepspeed
import torch

from comet_ds.op_builder.locks import TORCH_LOCK

# DeepSpeed's operations as earlier runs of this environment have compiled them: it takes minutes.
# ninja builds all of it again where its log is another version's.
VERSIONS = torch.__version__, deepspeed.__version__, version("ninja")
COMPILED = Path(sys.prefix) / "comet_ds_tests" / "-".join(VERSIONS)


def fill(folder: Path) -> None:
    """Copy DeepSpeed's compiled operations into an empty folder, times and all: ninja compares."""
    for operation in COMPILED.glob("*[!~]"):
        shutil.copytree(operation, folder / operation.name)


def keep(folder: Path) -> None:
    """Let later runs have those of DeepSpeed's operations that are new.

    What others copy is never written to: a copy gets its name when it is complete.
    """
    if sys.prefix == sys.base_prefix or not os.access(sys.prefix, os.W_OK):
        return  # no virtual environment of the tests' own
    for operation in folder.iterdir():
        is_complete = (operation / f"{operation.name}.so").exists()
        kept = COMPILED / operation.name
        if operation.name.startswith("comet_ds") or not is_complete or kept.exists():
            continue
        incomplete = COMPILED / f"{operation.name}.{os.getpid()}~"
        shutil.copytree(operation, incomplete, ignore=shutil.ignore_patterns(TORCH_LOCK))
        try:
            incomplete.rename(kept)
        except OSError:  # another run was faster
            shutil.rmtree(incomplete)
