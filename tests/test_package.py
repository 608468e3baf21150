# SPDX-License-Identifier: Apache-2.0
"""What a user installs: the wheel's contents, and the op builder's flags and reasons."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder

from comet_ds.cli import report
from comet_ds.op_builder.comet_moe import CSRC, CometMoEBuilder, TimelineBuilder

ROOT = Path(__file__).parent.parent


def test_wheel_carries_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info")
    )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"comet_ds/{p.relative_to(ROOT / 'comet_ds')}" for p in ROOT.glob("comet_ds/**/*.py")
    }
    expected |= {str("comet_ds" / p.relative_to(ROOT)) for p in ROOT.glob("op_builder/*.py")}
    expected |= {str("comet_ds" / p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*")}
    expected.add("comet_ds/py.typed")
    assert expected <= names, expected - names
    tops = {name.split("/")[0] for name in names if "dist-info" not in name}
    assert tops == {"comet_ds"}, tops  # a top-level op_builder would shadow DeepSpeed's


def test_builder_targets_sm_90a_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    builder = CometMoEBuilder()
    flags = builder.nvcc_args()
    assert [f for f in flags if "arch" in f] == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert "--use_fast_math" not in flags
    for path in [*builder.sources(), *builder.include_paths()]:
        assert Path(path).is_absolute() and Path(path).exists(), path


def test_builder_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from comet_ds.op_builder import comet_moe

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert CometMoEBuilder().why_not() == "no CUDA device"
    assert not CometMoEBuilder().is_compatible()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "compute capability 9.0, this GPU has (8, 0)" in CometMoEBuilder().why_not()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(comet_moe, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(comet_moe, "cuda_version", lambda: (12, 4))
    assert "nvcc 12.4 is too old" in CometMoEBuilder().why_not()
    monkeypatch.setattr(comet_moe, "cuda_version", lambda: (13, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "nvcc is of CUDA 13, torch of CUDA 12.8" in CometMoEBuilder().why_not()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert CometMoEBuilder().why_not() is None
    missing = {"ninja"}
    monkeypatch.setattr(shutil, "which", lambda name: None if name in missing else name)
    assert "ninja not found" in CometMoEBuilder().why_not()
    missing.add("c++")
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler c++ not found: install g++" in CometMoEBuilder().why_not()
    monkeypatch.setenv("CXX", "ccache g++")
    assert "ninja not found" in CometMoEBuilder().why_not()
    monkeypatch.setattr(comet_moe, "find_nvcc", lambda: None)
    assert "nvcc not found" in CometMoEBuilder().why_not()
    with pytest.raises(RuntimeError, match="nvcc not found"):
        CometMoEBuilder().compile(Path("/nowhere/kernels.so"))


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("#!/bin/sh\necho something else", " --version does not print a version"),
        ("no program", " does not run: "),
    ],
)
def test_nvcc_that_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, nvcc, reason
) -> None:
    from comet_ds.op_builder import comet_moe

    path = tmp_path / "nvcc"
    path.write_text(nvcc)
    path.chmod(0o755)
    monkeypatch.setattr(comet_moe, "find_nvcc", lambda: str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert f"{path}{reason}" in CometMoEBuilder().why_not()
    with pytest.raises(RuntimeError, match=reason):
        CometMoEBuilder().compile(tmp_path / "kernels.so")
    monkeypatch.setattr(report, "find_nvcc", lambda: str(path))
    assert f"nvcc         {path}{reason}" in "\n".join(report.describe_versions())


def test_module_compiled_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never loaded, which would fail or worse; without a compiler the reason says both."""
    from comet_ds.op_builder import comet_moe

    builder, compiled = CometMoEBuilder(), SimpleNamespace()
    path = tmp_path / "comet_ds_moe.so"
    path.write_bytes(b"\0" + builder.fingerprint().encode() + b"\0")
    assert builder.fits(path)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    assert not builder.fits(path)
    monkeypatch.setattr(builder, "prebuilt", lambda: path)
    monkeypatch.setattr(CUDAOpBuilder, "load", lambda self, verbose: compiled)
    assert builder.load() is compiled
    monkeypatch.setattr(comet_moe, "find_nvcc", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    reason = builder.why_not()
    assert reason.startswith(f"{path} was compiled for another torch or from other sources, and ")
    assert "nvcc not found" in reason
    path.write_bytes(builder.fingerprint().encode())
    assert builder.why_not() is None


def test_compiling_ahead_in_an_empty_environment() -> None:
    """As pip builds unless told otherwise: torch is not there."""
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build_ext']; "
    code += "exec(open('setup.py').read())"
    env = {**os.environ, "DS_BUILD_COMET_MOE": "1"}
    command = [sys.executable, "-c", f"__file__ = 'setup.py'; {code}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode, done.stdout
    assert "pip install --no-build-isolation . (" in done.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the installation compiles is taken, as long as it is of these sources."""
    builder = CometMoEBuilder()
    path = tmp_path / "comet_ds_moe.so"
    builder.compile(path)
    monkeypatch.setattr(builder, "prebuilt", lambda: path)
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # torch for CPUs lacks what is only called on a GPU
    try:
        assert builder.load().row_block == 128
    finally:
        sys.setdlopenflags(flags)
    monkeypatch.setattr(builder, "fingerprint", lambda: "of other sources")
    compiled = SimpleNamespace()
    monkeypatch.setattr(CUDAOpBuilder, "load", lambda self, verbose: compiled)
    assert builder.load() is compiled and compiled.fingerprint == "of other sources"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("builder", "source"),
    [
        *((CometMoEBuilder(), path) for path in sorted(CSRC.rglob("*.cu"))),
        (TimelineBuilder(), CSRC / "gemm" / "expert_gemm_bfloat16.cu"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_kernels_compile_without_spills_or_losses(
    builder: CometMoEBuilder, source: Path, tmp_path: Path
) -> None:
    command = ["nvcc", *builder.nvcc_args(), "-I", str(CSRC), "-Xptxas", "-v", "-Werror"]
    command += ["all-warnings", "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert len(spills) >= done.stderr.count("Compiling entry function"), done.stderr
    assert set(spills) <= {"0"}, done.stderr
    # Such as wgmma that are serialised because a function is called beside them.
    assert "Potential Performance Loss" not in done.stderr, done.stderr


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Says what is there, why there are no kernels, and which path a layer takes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report.main([])
    text = capsys.readouterr().out
    assert f"torch        {torch.__version__}" in text
    assert "kernels      no: no CUDA device" in text
    assert "path         pipelined, with PyTorch operations: no CUDA device" in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    report.main([])
    text = capsys.readouterr().out
    reason = "the kernels need compute capability 9.0, this GPU has (8, 0)"
    assert f"path         pipelined, with PyTorch operations: {reason}" in text
    monkeypatch.setattr(CometMoEBuilder, "why_not", lambda self: None)
    report.main([])
    text = capsys.readouterr().out
    assert "compiled at first use in" in text or "compiled in" in text
    assert "path         fused with bf16 or fp16" in text


def test_importing_needs_no_cuda_and_no_build() -> None:
    code = "import torch, comet_ds; assert not torch.cuda.is_initialized(); print(comet_ds.MoE)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
