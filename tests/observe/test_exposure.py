# SPDX-License-Identifier: Apache-2.0
"""What communication takes from computation: from the kernels' counters to the written metrics."""

from __future__ import annotations

import csv
import ctypes
import os
from pathlib import Path

import pytest
import torch
from helpers.training import build_engine, config, train

import comet_ds
from comet_ds.fused.peer.exposure import ExposureMeter
from comet_ds.tuning.cost_model import LayerShape

SHAPE = LayerShape((8192, 8192), 0, 8, 128, 2, 2048, 768, "bfloat16", 132)


def call(meter: ExposureMeter, direction: int, communicating_ns: int, meeting_ns: int) -> None:
    """Count a call as the kernels do: Exposure of csrc/peer/exchange.h, here in host memory."""
    exposure = (ctypes.c_int64 * 2).from_address(meter.begin(direction))
    exposure[0] += communicating_ns
    exposure[1] += meeting_ns


def test_means_by_direction() -> None:
    """132 SMs that communicate for 30 us, and 20 us in which all wait, are 50 us of a call."""
    meter = ExposureMeter(torch.device("cpu"))
    assert meter.read(132) == {}
    call(meter, 0, 132 * 30_000, 20_000)
    assert meter.read(132) == pytest.approx({"forward": 0.05})
    call(meter, 0, 132 * 10_000, 0)
    call(meter, 1, 66 * 8_000, 1_000)
    assert meter.read(132) == pytest.approx({"forward": 0.03, "backward": 0.005})


def write_exposure(rank: int, size: int, folder: str) -> None:
    """Write the metrics of a model whose first layer has been metered in forward."""
    os.chdir(folder)
    monitor = {"enabled": True, "output_path": folder, "job_name": "run"}
    settings = config(size, csv_monitor=monitor, comet_ds={"metrics": False})
    engine = build_engine("comet_ds", settings, ep_size=size)
    writer = comet_ds.attach_metrics(engine, interval=100)
    train(engine, rank, 1)
    fused = engine.module.moe[0].deepspeed_moe.fused
    fused.shape, fused.meter = SHAPE, ExposureMeter(torch.device("cpu"))
    call(fused.meter, 0, 132 * 30_000, 20_000)
    writer.write()


def test_exposure_is_written_where_it_was_measured(world, tmp_path: Path) -> None:
    """In ms, and as the share of the time the link alone would take that is hidden."""
    world(1).run(write_exposure, str(tmp_path))
    found = {}
    for file in (tmp_path / "run").glob("*.csv"):
        if "exposed" in file.name or "hidden_share" in file.name:
            found[file.stem] = float(list(csv.reader(file.open()))[-1][1])
    # Tokens to 8 of 128 experts on two ranks, there and back, of 4096 bytes, at 340 GB/s.
    wire_ms = 2 * 8192 * (1 - 2**-8) * 4096 / 340e9 * 1e3
    assert found == {
        "comet_ds_layer_00_exposed_forward_ms": pytest.approx(0.05),
        "comet_ds_layer_00_hidden_share_forward": pytest.approx(1 - 0.05 / wire_ms),
    }
