# SPDX-License-Identifier: Apache-2.0
"""Locks around compiling: processes that are killed are not waited for, others are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.builder import CUDAOpBuilder
from torch.utils import cpp_extension

from comet_ds.cli import report
from comet_ds.op_builder import comet_moe, locks
from comet_ds.op_builder.comet_moe import CometMoEBuilder

# What torch does before a compilation, up to 2.13, and what we do.
TORCHS = """
import os
os.open({folder!r} + "/lock", os.O_CREAT | os.O_EXCL)
"""
OURS = """
from pathlib import Path
from comet_ds.op_builder.locks import compiling
lock = compiling(Path({folder!r}), print)
lock.__enter__()
"""
HANG = """
import time
print("locked", flush=True)
time.sleep(600)
"""


def start(code: str, folder: Path) -> subprocess.Popen:
    """Start a process that has locked a folder when this returns, and hangs."""
    command = [sys.executable, "-c", code.format(folder=str(folder)) + HANG]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "locked\n" in iter(process.stdout.readline, "")  # DeepSpeed has its say before
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of an extension in an empty folder of extensions, as with torch 2.13."""
    monkeypatch.setattr(locks, "TORCH_LEAVES_LOCKS", True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "deepspeed_shm_comm").mkdir()
    return tmp_path / "deepspeed_shm_comm"


def test_own_lock_ends_with_its_process(folder: Path) -> None:
    process, lines = start(TORCHS + OURS, folder), []
    assert locks.is_held(folder)
    assert locks.holder(folder / locks.OWN_LOCK).startswith(f"process {process.pid} of ")
    kill(process)
    assert not locks.is_held(folder)
    assert (folder / "lock").exists()  # for which torch would wait for ever
    with locks.compiling(folder, lines.append):
        assert locks.is_held(folder)
        assert not (folder / "lock").exists()
    assert not locks.is_held(folder)
    (line,) = lines
    assert line == f"removed {folder / 'lock'}, which nobody holds"


def test_waiting_says_for_whom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "REMINDER_S", 0.5)
    process, lines = start(OURS, folder), []

    def warn(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            kill(process)

    with locks.compiling(folder, warn):
        pass
    assert len(lines) == 3, lines
    for i, line in enumerate(lines):
        assert float(line.split(" s of waiting")[0]) == pytest.approx(0.5 * (i + 1), abs=0.6)
        assert f"waiting for process {process.pid} of " in line
        assert line.endswith(
            f"deepspeed_shm_comm in {folder}: end that process to go on without it"
        )


def test_a_lock_in_use_is_left_alone(folder: Path) -> None:
    """Somebody without our lock, as an older version, may be compiling."""
    process, lines = start(TORCHS, folder), []
    try:
        with locks.compiling(folder, lines.append):
            assert (folder / "lock").exists()
    finally:
        kill(process)
    assert lines == []


def test_a_file_system_without_locks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    lines: list[str] = []
    (folder / "lock").touch()
    with locks.compiling(folder, lines.append):
        assert (folder / "lock").exists()  # nothing says that nobody compiles
    (line,) = lines
    assert "No locks available): set TORCH_EXTENSIONS_DIR to a local folder" in line


@pytest.mark.parametrize("depth", ["", "py311_cpu"])
def test_stale_locks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: str) -> None:
    """With and without torch's folder for a version in between; only those nobody holds."""
    monkeypatch.setattr(locks, "TORCH_LEAVES_LOCKS", True)
    monkeypatch.setattr(locks.cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    folders = [tmp_path / depth / name for name in ("cpu_adam", "deepspeed_shm_comm", "utils")]
    for each in folders:
        each.mkdir(parents=True)
    adam, shm, _ = folders
    process = start(TORCHS, shm)
    (adam / "lock").touch()
    assert locks.find_stale_locks() == [adam / "lock"]
    kill(process)
    assert locks.find_stale_locks() == [adam / "lock", shm / "lock"]
    assert locks.find_stale_locks("deepspeed_shm_comm") == [shm / "lock"]
    text = locks.describe_stale_lock(shm / "lock")
    assert "deepspeed_shm_comm is locked by nobody: a process that was killed" in text
    assert f"rm {shm / 'lock'}" in text


def test_report_says_how_to_clear_a_lock(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kill(start(TORCHS, folder))
    ours = CometMoEBuilder().build_folder()
    process = start(TORCHS + OURS, ours)
    monkeypatch.setattr(CometMoEBuilder, "why_not", lambda self: None)
    report.main([])
    text = capsys.readouterr().out
    assert "stale lock   deepspeed_shm_comm is locked by nobody" in text
    assert f"process {process.pid} of " in text and " is compiling them now" in text
    kill(process)
    report.main([])
    text = capsys.readouterr().out
    assert "their compilation was killed: the next run compiles them again" in text
    assert text.count("stale lock") == 1, text


def test_builder_compiles_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that was killed half way does not keep the next from compiling."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(locks, "TORCH_LEAVES_LOCKS", True)
    builder, seen = CometMoEBuilder(), []
    monkeypatch.setattr(builder, "prebuilt", lambda: None)
    kill(start(TORCHS + OURS, builder.build_folder()))

    def load(self: CUDAOpBuilder, verbose: bool) -> object:
        folder = tmp_path / CometMoEBuilder.NAME
        seen.append((locks.is_held(folder), (folder / "lock").exists()))
        return comet_moe

    monkeypatch.setattr(CUDAOpBuilder, "load", load)
    monkeypatch.setattr(comet_moe, "fingerprint", "", raising=False)
    assert builder.load() is comet_moe
    assert seen == [(True, False)]


def test_torch_that_locks_as_we_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2.14 on: its file stays after every compilation, and must."""
    monkeypatch.setattr(locks, "TORCH_LEAVES_LOCKS", False)
    (folder / "lock").touch()
    assert locks.find_stale_locks() == []
    lines: list[str] = []
    with locks.compiling(folder, lines.append):
        assert (folder / "lock").exists() and not lines


def test_what_torch_does_is_known(tmp_path: Path) -> None:
    """Of this torch: whether an extension's lock stays once the extension is there."""
    source = tmp_path / "empty.cpp"
    source.write_text('extern "C" int nothing() { return 0; }')
    cpp_extension.load(
        "empty", [str(source)], build_directory=str(tmp_path), is_python_module=False
    )
    assert (tmp_path / "lock").exists() != locks.TORCH_LEAVES_LOCKS


@pytest.mark.skipif(not locks.TORCH_LEAVES_LOCKS, reason="this torch leaves no stale locks")
def test_example_names_a_stale_lock(folder: Path) -> None:
    """Instead of waiting for ever, as whoever initialises DeepSpeed on a CPU."""
    kill(start(TORCHS, folder))
    script = Path(__file__).parents[2] / "examples" / "train_gpt_moe.py"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1, done.stderr
    assert f"rm {folder / 'lock'}" in done.stderr
