# SPDX-License-Identifier: Apache-2.0
"""The example as a user runs it: through the deepspeed launcher, on 2 ranks, and resumed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DEEPSPEED = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))


def launch(*args: str, num_ranks: int = 2) -> str:
    command = [DEEPSPEED, "--num_gpus", str(num_ranks), str(EXAMPLES / "train_gpt_moe.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def losses(output: str, kind: str) -> tuple[float, float]:
    first, last = re.search(rf"{kind}: loss ([\d.]+) -> ([\d.]+)", output).groups()
    return float(first), float(last)


def test_trains_and_resumes(tmp_path: Path) -> None:
    options = ["--save", str(tmp_path / "checkpoints")]
    launch("--steps", "8", *options)  # too short to be timed, not too short to be saved
    first, middle = losses(launch("--steps", "40", *options), "comet_ds")
    assert middle < first - 0.5
    output = launch("--steps", "60", *options)
    resumed, last = losses(output, "comet_ds")
    # It goes on where it stopped: no second descent from the start, no repeated steps.
    assert resumed < first - 0.5 and last < middle
    assert "40/60" in output


def test_one_rank() -> None:
    first, last = losses(launch("--steps", "40", num_ranks=1), "comet_ds")
    assert last < first - 0.5


def test_deepspeeds_layer_and_own_data(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 400)
    args = ["--data", str(text), "--steps", "30", "--seq-len", "64"]
    ours = losses(launch(*args), "comet_ds")
    theirs = losses(launch(*args, "--moe", "deepspeed"), "deepspeed")
    assert ours[0] == pytest.approx(theirs[0], rel=0.02)
    assert ours[1] == pytest.approx(theirs[1], rel=0.1)


def test_autoep() -> None:
    """The modules that AutoEP replaces are found, and the model trains as with our layer."""
    args = ["--steps", "30", "--no-drop", "--top-k", "3"]
    theirs = losses(launch(*args, "--moe", "autoep"), "autoep")
    ours = losses(launch(*args), "comet_ds")
    assert theirs[1] < theirs[0] - 0.3
    assert ours == pytest.approx(theirs, rel=0.02)
