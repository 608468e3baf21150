# SPDX-License-Identifier: Apache-2.0
"""A test run has caches of its own: no process that tests start uses those of the user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from torch.utils import cpp_extension

from comet_ds.op_builder.comet_moe import CometMoEBuilder
from comet_ds.tuning.table import default_path

TELL = """
import sys
sys.path.insert(0, {tests!r})
from test_caches import used_folders
print(*used_folders(0, 1), sep="\\n")
"""


def used_folders(rank: int, size: int) -> list[str]:
    """Return where this process would compile DeepSpeed's operations and ours, and the table."""
    deepspeeds = cpp_extension._get_build_directory("test_caches", verbose=False)
    return [deepspeeds, str(CometMoEBuilder().build_folder()), str(default_path())]


def assert_own(found: list[str], folder: Path) -> None:
    *extensions, table = map(Path, found)
    assert all(path.is_relative_to(folder) for path in extensions), found
    assert table.is_relative_to(folder.parent), found


def test_ranks_of_a_world_use_the_runs_caches(world, extensions_folder: Path) -> None:
    for found in world(2).run(used_folders):
        assert_own(found, extensions_folder)


def test_other_processes_use_the_runs_caches(extensions_folder: Path) -> None:
    command = [sys.executable, "-c", TELL.format(tests=str(Path(__file__).parent))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert_own(done.stdout.splitlines()[-3:], extensions_folder)
