# SPDX-License-Identifier: Apache-2.0
"""Say which software and GPUs this machine has, and which path a layer takes on it.

Examples:
    python -m comet_ds report
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import deepspeed
import torch

from comet_ds import __version__
from comet_ds.cli.arguments import make_parser
from comet_ds.fused.peer.memory import describe_link
from comet_ds.op_builder.comet_moe import CometMoEBuilder, cuda_version, find_nvcc
from comet_ds.op_builder.locks import (
    OWN_LOCK,
    TORCH_LOCK,
    describe_stale_lock,
    find_stale_locks,
    holder,
    is_held,
    is_stale,
)


def describe_versions() -> Iterator[str]:
    """Yield one line per piece of software."""
    yield f"comet_ds     {__version__}, {Path(__file__).parent.parent}"
    yield f"DeepSpeed    {deepspeed.__version__}"
    yield f"torch        {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if (nvcc := find_nvcc()) is None:
        yield "nvcc         not found"
        return
    try:
        yield "nvcc         {}.{}, {}".format(*cuda_version(), nvcc)
    except RuntimeError as error:
        yield f"nvcc         {error}"


def describe_gpus() -> Iterator[str]:
    """Yield one line per GPU, and one for the links between them."""
    count = torch.cuda.device_count()
    if count == 0:
        yield "GPU          none"
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        memory = gpu.total_memory / 2**30
        yield (
            f"GPU {i}        {gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.multi_processor_count} SMs, {memory:.0f} GiB"
        )
    if count > 1:
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        direct = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
        access = f"{direct} of {len(pairs)} ordered pairs have peer access"
        yield f"links        {access}; GPU 0 has {describe_link()}"


def describe_kernels() -> Iterator[str]:
    """Yield lines about where the kernels come from and which path a layer takes."""
    builder = CometMoEBuilder()
    reason = builder.why_not()
    if reason is not None:
        yield f"kernels      no: {reason}"
    elif (path := builder.prebuilt()) and builder.fits(path):
        yield f"kernels      compiled by the installation, {path}"
    else:
        folder = builder.build_folder()
        is_cached = any(folder.glob("*.so"))
        yield f"kernels      {'compiled' if is_cached else 'compiled at first use'} in {folder}"
        if is_held(folder):
            yield f"             {holder(folder / OWN_LOCK)} is compiling them now"
        elif is_stale(folder / TORCH_LOCK):
            yield "             their compilation was killed: the next run compiles them again"
    if reason is None:
        yield "path         fused with bf16 or fp16, MLP experts, and expert parallel groups of one"
        yield "             host's GPUs with peer access; else pipelined"
    else:
        yield f"path         pipelined, with PyTorch operations: {reason}"


def describe_locks() -> Iterator[str]:
    """Yield a line for each stale lock, for which a run that compiles would wait forever."""
    for lock in find_stale_locks():
        if (lock.parent / OWN_LOCK).exists():  # ours, which the next run removes
            continue
        yield f"stale lock   {describe_stale_lock(lock)}"


def main(arguments: Sequence[str]) -> None:
    """Print the report."""
    make_parser("report", __doc__).parse_args(arguments)
    for describe in (describe_versions, describe_gpus, describe_kernels, describe_locks):
        for line in describe():
            print(line)
