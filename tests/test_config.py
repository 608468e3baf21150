# SPDX-License-Identifier: Apache-2.0
"""The "comet_ds" block: defaults, every kind of mistake, every form of configuration."""

from __future__ import annotations

import base64
import inspect
import json
from pathlib import Path

import deepspeed
import pytest
from torch import nn

import comet_ds
from comet_ds.config import CometConfig, read_block

BLOCK = {"path": "reference", "num_chunks": 4, "grouped_gemm": False, "metrics_interval": 7}
BAD: dict[str, tuple[object, str]] = {
    "misspelt key": ({"pth": "auto"}, r"unknown key 'pth' \(known: path, num_chunks"),
    "unknown path": ({"path": "fast"}, "path: .*'fast'"),
    "no chunks": ({"num_chunks": 0}, "num_chunks.*greater than or equal to 1, got 0"),
    "chunks in words": ({"num_chunks": "two"}, "num_chunks.*'two'"),
    "half a chunk": ({"num_chunks": 1.5}, "num_chunks.*1.5"),
    "a word for a boolean": ({"metrics": "yes"}, "metrics.*'yes'"),
    "no interval": ({"metrics_interval": 0}, "metrics_interval.*greater than or equal to 1, got 0"),
    "two mistakes": ({"grouped_gemm": 1, "x": 2}, "grouped_gemm.*unknown key 'x'"),
    "no object": ([], r"must be an object, got \[\]"),
}


def test_defaults() -> None:
    assert CometConfig.parse(None) == CometConfig.parse({}) == CometConfig()
    assert CometConfig().path == "auto" and CometConfig().metrics_interval is None


@pytest.mark.parametrize("name", BAD)
def test_bad_block(name: str) -> None:
    block, message = BAD[name]
    with pytest.raises(ValueError, match='"comet_ds".*' + message):
        CometConfig.parse(block)


def test_read_from_every_form(tmp_path: Path) -> None:
    config = {"train_batch_size": 1, "comet_ds": BLOCK}
    file = tmp_path / "ds.json"
    # DeepSpeed reads hjson: comments are allowed.
    file.write_text("# comment\n" + json.dumps(config))
    encoded = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    for form in (config, str(file), file, encoded):
        assert CometConfig.parse(read_block(form)) == CometConfig(**BLOCK)
    assert read_block({"train_batch_size": 1}) is None and read_block(None) is None
    with pytest.raises(ValueError, match=r"no DeepSpeed configuration at 'missing\.json'"):
        read_block("missing.json")


def test_initialize_has_deepspeeds_signature() -> None:
    assert inspect.signature(comet_ds.initialize) == inspect.signature(deepspeed.initialize)


def test_initialize_refuses_a_bad_block_before_it_builds() -> None:
    with pytest.raises(ValueError, match="unknown key 'chunks'"):
        comet_ds.initialize(model=nn.Linear(2, 2), config={"comet_ds": {"chunks": 2}})
