# SPDX-License-Identifier: Apache-2.0
"""Ranks of this host for a command: each process becomes one, or starts them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

import deepspeed
from deepspeed.accelerator import get_accelerator


def launch_ranks(arguments: Sequence[str], num_ranks: int) -> None:
    """Make this process a rank of so many, a GPU each; it starts them where it is not one yet.

    Args:
        arguments: of ``python -m comet_ds``, which runs on every rank.
        num_ranks: of this host.
    """
    if "RANK" not in os.environ and num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
        command = [sys.executable, *launcher, "-m", "comet_ds", *arguments]
        os.execv(sys.executable, command)
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    deepspeed.init_distributed()
