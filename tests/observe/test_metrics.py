# SPDX-License-Identifier: Apache-2.0
"""Metrics reach DeepSpeed's monitors with the right values: CSV, and a W&B run read back.

They are written every so many steps, cost no host wait in between, and ranks must agree on them.
"""

from __future__ import annotations

import csv
import json
import os
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recording import make_records
from helpers.training import NUM_EXPERTS, build_engine, config, train
from torch.utils._python_dispatch import TorchDispatchMode

import comet_ds
from comet_ds.observe.cta_timeline import LayerRecorder, Timeline
from comet_ds.observe.flops import flop_per_token
from comet_ds.observe.metrics import RUN_METRICS

INTERVAL, STEPS, TIMELINE_STEP = 2, 6, 3

TIMES = ("forward_ms", "backward_ms")

TOKENS_PER_STEP = 2 * 2 * 12  # ranks, batch, sequence


def logged_values(rank: int, size: int, settings: dict, folder: str) -> dict:
    """Train; return what the metrics of the last write must be, computed here from the routing."""
    os.chdir(folder)
    os.environ.update(WANDB_MODE="offline", WANDB_DIR=folder, WANDB_SILENT="true")
    options = {"metrics_interval": INTERVAL, "timeline_step": TIMELINE_STEP}
    settings = config(size, comet_ds=options, **settings)
    engine = build_engine("comet_ds", settings, ep_size=size, k=2, capacity_factor=0.75)
    marks = []

    class Recorder(LayerRecorder):
        """There are no kernels here that could record."""

        def mark(self, tensor: torch.Tensor) -> float:
            marks.append(engine.global_steps)
            return super().mark(tensor)

        def read_timeline(self) -> Timeline:
            return Timeline.from_records(make_records())

    writer = engine._take_model_step.__self__
    records = []  # of metrics, handed to W&B
    if rank == 0:
        writer._recorder = Recorder(engine.module.moe[0], writer._is_timeline_step)
    if rank == 0 and "wandb" in settings:
        wandb_monitor = engine.monitor.wandb_monitor
        log = wandb_monitor.log
        wandb_monitor.log = lambda data, **kwargs: (records.append(data), log(data, **kwargs))
    train(engine, rank, STEPS)
    if rank == 0 and "wandb" in settings:
        ours = [data for data in records if any(k.startswith("comet_ds") for k in data)]
        assert len(ours) == STEPS // INTERVAL, "a record each write, whatever the number of values"
    # The forward of the step and its backward: begin and end of each.
    assert marks == ([TIMELINE_STEP - 1] * 4 if rank == 0 else [])
    expected = {}
    for index, moe in enumerate(engine.module.moe):
        routing = moe.deepspeed_moe.routing
        rows = torch.zeros(NUM_EXPERTS)
        for expert in routing.topk_ids.flatten().tolist():
            if expert >= 0:
                rows[expert] += 1
        l_aux = routing.l_aux.clone()
        torch.distributed.all_reduce(rows)
        torch.distributed.all_reduce(l_aux)
        wanted = size * routing.topk_ids.numel()
        own = rows.view(size, -1)[0].sum().item()
        expected[f"comet_ds_layer_0{index}/path"] = 1.0
        expected[f"comet_ds_layer_0{index}/l_aux"] = l_aux.item() / size
        expected[f"comet_ds_layer_0{index}/load_imbalance"] = (rows.max() / rows.mean()).item()
        expected[f"comet_ds_layer_0{index}/dropped_share"] = 1 - rows.sum().item() / wanted
        expected[f"comet_ds_layer_0{index}/rows_received"] = own
        assert 0 < expected[f"comet_ds_layer_0{index}/dropped_share"] < 0.6
    expected["flop_per_token"] = flop_per_token(engine.module)
    if rank == 0 and "wandb" in settings:
        import wandb

        wandb.finish()
    return expected


def check_history(history: dict[str, dict[int, float]], expected: dict[str, float]) -> None:
    """``history`` maps label to {global_samples: value}."""
    flop = expected.pop("flop_per_token")
    steps = [2 * 2 * i for i in range(INTERVAL, STEPS + 1, INTERVAL)]
    for label, value in expected.items():
        assert list(history[label]) == steps, label
        assert history[label][steps[-1]] == pytest.approx(value, rel=1e-6), label
    rate, took = history["comet_ds/tokens_per_s"], history["comet_ds/step_time_ms"]
    tflops = history["comet_ds/tflops_per_gpu"]
    assert list(rate) == list(took) == list(tflops) == steps
    spent = {name: history[f"comet_ds_layer_0{i}/{name}"] for i in (0, 1) for name in TIMES}
    assert all(list(values) == steps for values in spent.values())
    for step in steps:
        assert sum(values[step] for values in spent.values()) > 0
        assert tflops[step] == pytest.approx(flop * rate[step] / 2 / 1e12, rel=1e-6)
        # Two views of one interval: tokens a step over seconds a step.
        assert rate[step] == pytest.approx(TOKENS_PER_STEP / (took[step] / 1e3), rel=1e-6)
    assert list(history["Train/Samples/lr"])[-1] == steps[-1]  # DeepSpeed's own x-axis


def check_csv(folder: Path, expected: dict[str, float]) -> None:
    """Check the files of DeepSpeed's CSV monitor."""
    history = {}
    names = [name for name in RUN_METRICS if name != "model_flop_utilisation"]  # a GPU's
    labels = [label for label in expected if label != "flop_per_token"]
    labels += [f"comet_ds_layer_0{i}/{name}" for i in (0, 1) for name in TIMES]
    for label in [*labels, *(f"comet_ds/{name}" for name in names), "Train/Samples/lr"]:
        with open(folder / (label.replace("/", "_") + ".csv")) as file:
            rows = list(csv.reader(file))[1:]
        history[label] = {int(step): float(value) for step, value in rows}
    check_history(history, expected)


def csv_settings(folder: Path) -> dict[str, dict]:
    return {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "run"}}


def test_csv(world, tmp_path: Path) -> None:
    expected = world(2).run(logged_values, csv_settings(tmp_path), str(tmp_path))[0]
    check_csv(tmp_path / "run", expected)


def read_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a W&B file: LevelDB's log format behind a header of 7 bytes.

    Blocks of 32 KiB hold fragments: checksum (4 bytes), length (2), type (1), data. A record is one
    fragment of type 1, or fragments of types 2, 3 ..., 4; less than 7 bytes of a block are padding.
    """
    block, header = 32768, 7
    position, record = header, b""
    while position + header <= len(log):
        if block - position % block < header:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        if position + header + length > len(log):
            return  # still being written
        record += log[position + header : position + header + length]
        position += header + length
        if kind in (1, 4):
            yield record
            record = b""


def read_run(file: Path) -> list[Any]:
    """Return the records of a W&B run, once its service has written the last one."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 60
    while True:
        found = []
        for data in read_records(file.read_bytes()):
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(data)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.1)


def test_wandb(world, tmp_path: Path) -> None:
    """Read an offline run's own file back: what a later ``wandb sync`` would upload."""
    settings = {"wandb": {"enabled": True, "project": "comet_ds"}, **csv_settings(tmp_path)}
    expected = world(2).run(logged_values, settings, str(tmp_path))[0]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, told = defaultdict(dict), {}
    for record in read_run(file):
        items = {
            "/".join(i.nested_key) if i.nested_key else i.key: json.loads(i.value_json)
            for i in record.history.item
        }
        told |= {item.key: json.loads(item.value_json) for item in record.config.update}
        for label, value in items.items():
            if not label.startswith("_"):
                history[label][items["_step"]] = value
    check_history(history, dict(expected))
    check_csv(tmp_path / "run", expected)
    at = 2 * 2 * TIMELINE_STEP
    picture = history["comet_ds/timeline/path"][at]
    table = history["comet_ds/timeline_launches/path"][at]
    folder = file.parent / "files"
    assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / table).read_text())["data"]
    assert [row[0] for row in rows] == ["up", "weight_grad"]
    assert history["comet_ds/timeline_hidden_share"][at] == pytest.approx(rows[0][-1])
    assert len(list(tmp_path.glob("comet_ds_timeline/step_3.*"))) == 2
    assert told["comet_ds"] == {
        "moe": "comet_ds",
        "num_moe_layers": 2,
        "num_experts": NUM_EXPERTS,
        "top_k": 2,
        "ep_size": 2,
        "world_size": 2,
    }


class CountReads(TorchDispatchMode):
    """Counts values read from tensors to the host, each of which waits for the device on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default,)
        return func(*args, **(kwargs or {}))


def count_reads(rank: int, size: int, folder: str) -> tuple[int, int, int]:
    os.chdir(folder)
    monitor = {"enabled": True, "output_path": folder, "job_name": "x"}
    counts = []
    for metrics, interval in ((False, 1), (True, 100), (True, 1)):
        block = {"metrics": metrics, "metrics_interval": interval}
        settings = config(size, csv_monitor=monitor, comet_ds=block)
        engine = build_engine("comet_ds", settings, ep_size=size, k=2)
        train(engine, rank, 1)  # capacities are remembered
        with CountReads() as reads:
            train(engine, rank, 4)
        counts.append(reads.count)
    return tuple(counts)


def test_steps_in_between_read_nothing(world, tmp_path: Path) -> None:
    """Metrics add reads to the steps that write, and to no others."""
    for off, between, writing in world(2).run(count_reads, str(tmp_path)):
        assert off == between < writing


def check_defaults(rank: int, size: int, folder: str) -> None:
    """No steps_per_print: ten steps; after a checkpoint is loaded, intervals start anew."""
    os.chdir(folder)
    settings = config(size, csv_monitor={"enabled": True, "output_path": folder, "job_name": "y"})
    del settings["steps_per_print"]
    engine = build_engine("comet_ds", settings, ep_size=size)
    train(engine, rank, 10)
    engine.save_checkpoint(folder, tag="t")
    again = build_engine("comet_ds", settings, ep_size=size)
    again.load_checkpoint(folder, tag="t")
    train(again, rank, 10)
    try:
        comet_ds.attach_metrics(again)
    except ValueError as error:
        assert "has metrics already" in str(error)
        return
    raise AssertionError("attached twice")


def test_default_interval_and_resume(world, tmp_path: Path) -> None:
    world(2).run(check_defaults, str(tmp_path))
    with open(tmp_path / "y" / "comet_ds_step_time_ms.csv") as file:
        rows = [row for row in csv.reader(file) if row[0] != "step"]  # a header an engine
    assert [int(step) for step, _ in rows] == [40, 80]


def tokens_of_deepspeeds_layer(rank: int, size: int, folder: str) -> None:
    os.chdir(folder)
    settings = config(size, csv_monitor={"enabled": True, "output_path": folder, "job_name": "z"})
    train(build_engine("deepspeed", {**settings, "steps_per_print": 2}, ep_size=size), rank, 2)


def test_throughput_of_deepspeeds_layer(world, tmp_path: Path) -> None:
    """A comparison run logs the same throughput."""
    world(2).run(tokens_of_deepspeeds_layer, str(tmp_path))
    rate, took = (
        float((tmp_path / "z" / f"comet_ds_{name}.csv").read_text().split(",")[-1])
        for name in ("tokens_per_s", "step_time_ms")
    )
    assert rate == pytest.approx(TOKENS_PER_STEP / (took / 1e3), rel=1e-6)


def check_disagreement(rank: int, size: int, folder: str) -> str:
    monitor = {"enabled": True, "output_path": folder, "job_name": "w"}
    settings = config(size, csv_monitor=monitor, comet_ds={"metrics_interval": 2 + rank})
    try:
        build_engine("comet_ds", settings, ep_size=size)
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_that_disagree(world, tmp_path: Path) -> None:
    for answer in world(2).run(check_disagreement, str(tmp_path)):
        assert "metrics_interval must be the same on all ranks, got 2 on rank 0 and 3" in answer


def attach_without_monitor(rank: int, size: int) -> str:
    engine = build_engine("comet_ds", config(size), ep_size=size)
    try:
        comet_ds.attach_metrics(engine)
    except ValueError as error:
        return str(error)
    return "no error"


def test_no_monitor_is_an_error(world) -> None:
    for answer in world(2).run(attach_without_monitor):
        assert "no monitor is enabled" in answer
