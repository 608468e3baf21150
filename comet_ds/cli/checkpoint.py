# SPDX-License-Identifier: Apache-2.0
"""Inspect, consolidate or reshard a checkpoint, without an engine or a GPU.

Examples:
    python -m comet_ds checkpoint inspect FOLDER
    python -m comet_ds checkpoint consolidate FOLDER model.safetensors --dtype bf16
    python -m comet_ds checkpoint reshard FOLDER NEW_FOLDER --ep-size 4 --num-ranks 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from comet_ds.checkpoints.consolidate import DTYPES, consolidate
from comet_ds.checkpoints.files import BF16, FP16_FLAT, FP16_UNFUSED, PLAIN, ZERO, Checkpoint
from comet_ds.checkpoints.reshard import reshard
from comet_ds.cli.arguments import existing_file, make_parser, positive_int

_STATES = {ZERO: "partitioned", BF16: "partitioned", FP16_FLAT: "flat"}


def describe(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield lines about a checkpoint: layout, experts, parameters, optimizer."""
    model = checkpoint.model
    yield f"folder       {checkpoint.folder}"
    yield f"saved by     DeepSpeed {model.get('ds_version', '?')}, step {model['global_steps']}"
    stage = checkpoint.zero_stage
    yield f"ZeRO stage   {'unknown' if stage is None else stage}"
    yield f"ranks        {checkpoint.num_ranks}"
    data_first = ", use_data_before_expert_parallelism" if checkpoint.topology.is_data_first else ""
    sizes = sorted(set(checkpoint.ep_sizes.values()))
    yield f"ep_size      {', '.join(map(str, sizes)) or 'unknown'}{data_first}"
    for index, layer in enumerate(checkpoint.layers):
        path = layer.prefix.removesuffix(".deepspeed_moe.experts.deepspeed_experts.")
        size = checkpoint.ep_sizes.get(layer.prefix)
        local = f", {len(layer.paths) // size} on a rank" if size else ""
        yield f"MoE layer {index:<3}{path}: {len(layer.paths)} experts{local}"
    yield from _describe_parameters(checkpoint)
    yield from _describe_optimizer(checkpoint)


def _describe_parameters(checkpoint: Checkpoint) -> Iterator[str]:
    buffers = checkpoint.buffer_names()
    counts, dtypes = {"dense": 0, "of experts": 0}, set()
    for name in checkpoint.names():
        if name in buffers:
            continue
        tensor = checkpoint.tensor(name)
        counts["of experts" if ".deepspeed_experts." in name else "dense"] += tensor.numel()
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
    parts = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    yield f"parameters   {sum(counts.values()):,}: {parts}; {', '.join(sorted(dtypes))}"
    if frozen := checkpoint.model.get("frozen_param_shapes"):
        yield f"frozen       {len(frozen)} parameters of rank 0"


def _describe_optimizer(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.kind is None:
        yield "optimizer    none"
        return
    wrapper = "" if checkpoint.kind == PLAIN else f" in {checkpoint.kind}"
    name = checkpoint.setting("optimizer", "type") or "the client's"
    files = checkpoint.num_optimizer_files
    layout = _STATES.get(checkpoint.kind, "by parameter")
    yield f"optimizer    {name}{wrapper}, {layout}, {files} files"
    states: dict[str, str] = {}
    for entry in checkpoint.base(0)["state"].values():
        for key, value in entry.items():
            is_tensor = torch.is_tensor(value) and value.dim()
            states[key] = str(value.dtype).removeprefix("torch.") if is_tensor else f"{value:g}"
    if checkpoint.kind in (ZERO, BF16, FP16_FLAT, FP16_UNFUSED):
        states = {"weights": "float32", **states}
    yield "states       " + (", ".join(f"{k} {v}" for k, v in states.items()) or "none")
    for index, group in enumerate(checkpoint.param_groups(0)):
        kind = f"experts, {group['name']}" if group.get("moe") else "dense"
        yield f"group {index:<7}{kind}, lr {group['lr']:g}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("checkpoint", __doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def add(verb: str, what: str, example: str) -> argparse.ArgumentParser:
        example = f"Example: python -m comet_ds checkpoint {verb} {example}"
        made = verbs.add_parser(
            verb, help=what, description=f"{what.capitalize()}.", epilog=example
        )
        made.add_argument("folder", type=Path, help="folder given to save_checkpoint, or a tag's")
        made.add_argument("--tag", help="tag of the checkpoint (default: the latest)")
        made.add_argument(
            "--config", type=existing_file, help="DeepSpeed configuration of the run that saved it"
        )
        return made

    add("inspect", "say what a checkpoint holds", "FOLDER")
    example = "FOLDER model.safetensors --dtype bf16"
    single = add("consolidate", "write the whole model into one file", example)
    single.add_argument("file", type=Path, help="file to write: *.safetensors, or torch's format")
    single.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of parameters")
    example = "FOLDER NEW_FOLDER --ep-size 4 --num-ranks 16"
    other = add("reshard", "write a checkpoint for other ranks or another ep_size", example)
    other.add_argument("target", type=Path, help="folder to write, for load_checkpoint")
    other.add_argument("--ep-size", type=positive_int, help="ep_size of the run that will resume")
    other.add_argument(
        "--num-ranks", type=positive_int, help="data parallel ranks of the run that will resume"
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command; exit with a message where a checkpoint or an argument does not fit."""
    args = _parser().parse_args(arguments)
    try:
        checkpoint = Checkpoint.open(args.folder, args.tag, args.config)
        if args.verb == "inspect":
            print("\n".join(describe(checkpoint)))
        elif args.verb == "consolidate":
            print(consolidate(checkpoint, args.file, dtype=args.dtype))
        else:
            present = next(iter(checkpoint.ep_sizes.values()), 1)
            ep_size = present if args.ep_size is None else args.ep_size
            num_ranks = checkpoint.num_ranks if args.num_ranks is None else args.num_ranks
            print(reshard(checkpoint, args.target, ep_size=ep_size, num_ranks=num_ranks))
    except ValueError as error:
        sys.exit(f"comet_ds checkpoint: {error}")
