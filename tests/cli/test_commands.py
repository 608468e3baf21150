# SPDX-License-Identifier: Apache-2.0
"""The command line: every command's help, and options that several commands share."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from comet_ds.__main__ import COMMANDS, main

CHECKPOINT = [f"checkpoint {verb}" for verb in ("inspect", "consolidate", "reshard")]
ALL = [*COMMANDS, "bench train", *CHECKPOINT]
WITH_RANKS = ["bench", "bench train", "tune", "timeline"]


def help_of(command: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def error_of(arguments: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ALL)
def test_help_has_a_description_and_an_example(command: str, capsys: pytest.CaptureFixture) -> None:
    text = help_of(command, capsys)
    usage, description, *_ = text.split("\n\n")
    assert usage.startswith(f"usage: comet_ds {command} ")
    assert re.fullmatch(r"[A-Z][^\n]+\.", description), description
    assert f"python -m comet_ds {command}" in text.split("\n\n", 1)[1]
    options = text[text.index("\noptions:") :]
    # Every option says what it is: its help stands in its own line or the next.
    bare = re.findall(r"\n  (--\S+(?: \S+)?)(?=\n  -|\n\n|\n$)", options)
    assert set(bare) <= {"--capacity-factor CAPACITY_FACTOR"}, bare


@pytest.mark.parametrize("command", WITH_RANKS)
def test_ranks_are_gpus_of_this_host(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(help_of(command, capsys).split())
    assert "--ranks RANKS GPUs of this host, a rank each (default: " in text
    found = error_of(f"{command} --ranks 0", capsys)
    assert "argument --ranks: must be a whole number of at least 1, got '0'" in found
    found = error_of(f"{command} --ranks 3 --shapes qwen2-moe", capsys)
    assert "experts must be a multiple of --ranks, got 64 experts (qwen2-moe) and 3 ranks" in found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = error_of(f"{command} --ranks 4 --shapes qwen2-moe", capsys)
    assert "--ranks must be at most this host's 2 GPUs, got 4" in found


def test_other_commands_with_ranks_are_checked_too(capsys: pytest.CaptureFixture) -> None:
    assert [c for c in ALL if "--ranks RANKS" in help_of(c, capsys)] == [
        command for command in ALL if command in WITH_RANKS
    ]


@pytest.mark.parametrize("command", ["bench", "bench train", "tune", "timeline", "simulate"])
def test_shapes(command: str, capsys: pytest.CaptureFixture) -> None:
    assert "unknown shapes ['x']" in error_of(f"{command} --shapes olmoe,x", capsys)
    found = error_of(f"{command} --hidden 64 --top-k 2", capsys)
    assert "a shape of your own also needs --ffn, --experts" in found
    sizes = "--hidden 64 --ffn 64 --experts 4 --top-k"
    found = error_of(f"{command} {sizes} 8", capsys)
    assert "--top-k must be at most --experts, got 8 and 4" in found
    found = error_of(f"{command} {sizes} two", capsys)
    assert "argument --top-k: must be a whole number of at least 1, got 'two'" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench --skew 0.1,-1", "--skew: must be numbers from 0 to 1, got '0.1,-1'"),
        ("bench --num-runs 0", "--num-runs: must be a whole number of at least 1, got '0'"),
        ("simulate --nic-gbit -3", "--nic-gbit: must be a number above 0, got '-3'"),
        ("simulate --nic-gbit inf", "--nic-gbit: must be a number above 0, got 'inf'"),
        ("timeline --draw nowhere", "--draw: must be a file that exists, got 'nowhere'"),
        ("tune --ranks 1", "--ranks must be at least 2, got 1"),
        ("tune --config nowhere", "--config: must be a file that exists, got 'nowhere'"),
    ],
)
def test_errors_name_rule_and_value(
    arguments: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert message in error_of(arguments, capsys)


def test_commands_are_listed(capsys: pytest.CaptureFixture) -> None:
    main([])
    listed = re.findall(r"^  (\w+) +[A-Z].*\.$", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(COMMANDS)
    with pytest.raises(SystemExit, match="unknown command 'train', known: report, bench, tune"):
        main(["train"])


def test_module_runs() -> None:
    command = [sys.executable, "-m", "comet_ds", "simulate", "--shapes", "olmoe", "--ep-sizes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^olmoe +2  fused ", done.stdout, re.MULTILINE)
