# SPDX-License-Identifier: Apache-2.0
"""Start a command's ranks on this host."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

import deepspeed

from comet_ds._compat.deepspeed import accelerator


def launch_ranks(arguments: Sequence[str], num_ranks: int) -> None:
    """Make this process a rank, with a GPU of its own where there are GPUs.

    A process that torch's launcher has started joins the others. Any other process becomes the
    launcher of ``num_ranks`` processes and does not return, or the only rank where that is 1.

    Args:
        arguments: those of ``python -m comet_ds``, which every rank runs.
        num_ranks: number of ranks.
    """
    if "RANK" not in os.environ and num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)]
        command = [sys.executable, *launcher, "-m", "comet_ds", *arguments]
        os.execv(sys.executable, command)
    accelerator().set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    deepspeed.init_distributed()
