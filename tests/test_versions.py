# SPDX-License-Identifier: Apache-2.0
"""Versions of torch and DeepSpeed: what is refused, what is said, and what pip may replace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from comet_ds import _compat as versions
from comet_ds._compat import check_version

SETUP = Path(__file__).parent.parent / "setup.py"


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+1234.nv26", "2.13.0+cpu", "2.14.1+cu130"])
def test_tested_versions(version: str) -> None:
    bounds = versions.OLDEST_TORCH, versions.NEWEST_TESTED_TORCH
    assert check_version("torch", version, *bounds) is None
    assert check_version("deepspeed", "0.19.6+abc", (0, 19, 6), (0, 19, 8)) is None


def test_older_versions_are_refused_with_the_remedy() -> None:
    with pytest.raises(ImportError, match=r"needs torch 2\.11 or later, got 2\.9\.1\+cu130: pip "):
        check_version("torch", "2.9.1+cu130", (2, 11), (2, 14))
    with pytest.raises(ImportError, match=r'got 0\.19\.5: pip install "deepspeed>=0\.19\.6"'):
        check_version("deepspeed", "0.19.5", (0, 19, 6), (0, 19, 8))


@pytest.mark.parametrize("version", ["2.15.0", "2.15.0.dev20270101", "3.0"])
def test_newer_versions_are_said_once(version: str) -> None:
    said = check_version("torch", version, (2, 11), (2, 14))
    assert said == f"torch {version} is newer than comet_ds was tested with (2.11 to 2.14)"


def test_pip_leaves_the_installed_torch() -> None:
    """Whatever satisfies the requirement stays: newer ones and pre-releases too."""
    found = re.findall(r'^ +"(torch[^"]*)",$', SETUP.read_text(), re.MULTILINE)
    (requirement,) = map(Requirement, found)
    assert requirement.name == "torch"
    for version in ("2.11.0", "2.11.0a0+1234.nv26", "2.13.0+cpu", "2.15.0", "2.17.0", "3.0.0.dev1"):
        assert requirement.specifier.contains(version), version
    assert not requirement.specifier.contains("2.10.1")
