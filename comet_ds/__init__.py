# SPDX-License-Identifier: Apache-2.0
"""comet_ds: DeepSpeed's MoE layer with communication and computation overlapped."""

import comet_ds._compat  # noqa: F401  before what an older torch or DeepSpeed has not

# isort: split
from comet_ds.config import CometConfig
from comet_ds.initialize import initialize
from comet_ds.layer import MoE
from comet_ds.observe.metrics import attach_metrics
from comet_ds.zero.hooks import install_hooks
from comet_ds.zero.optimizer_groups import split_expert_groups

install_hooks()

__version__ = "0.1.0"
__all__ = ["CometConfig", "MoE", "attach_metrics", "initialize", "split_expert_groups"]
