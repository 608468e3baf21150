# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: worlds of ranks, caches of the run's own, and the gpu(n) marker.

Tests read as documentation: ``--collect-only`` prints what is established for which cases.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import extensions
from helpers.distributed import World


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "gpu(n): needs n CUDA devices of compute capability 9.0")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name plain values of cases by what they are: "k=2", "bfloat16"."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    is_plain = val is None or isinstance(val, bool | int | float)
    return f"{argname}={val}" if is_plain else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests, with the reason, where the GPUs are missing."""
    for mark in item.iter_markers("gpu"):
        wanted, found = mark.args[0], torch.cuda.device_count()
        if found < wanted:
            pytest.skip(f"needs {wanted} CUDA device(s), found {found}")
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs compute capability 9.0")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Make every test draw the same numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def extensions_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compile extensions in a folder of this run, and keep measured CTA splits in another.

    Worlds of ranks and other processes that tests start inherit both; the user's are neither read
    nor written.
    """
    folder = tmp_path_factory.mktemp("extensions")
    extensions.fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield folder
    extensions.keep(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[..., World]]:
    """Give ``world(size, backend="gloo")``: a running world, started where there is none."""
    worlds: dict[tuple[int, str], World] = {}

    def get(size: int, backend: str = "gloo") -> World:
        key = size, backend
        if key in worlds and worlds[key].has_many_threads:
            worlds[key].close()
        if key not in worlds or not worlds[key].is_open:
            worlds[key] = World(size, backend)
        return worlds[key]

    yield get
    for started in worlds.values():
        started.close()
