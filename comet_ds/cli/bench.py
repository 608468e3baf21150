# SPDX-License-Identifier: Apache-2.0
"""Check and time a layer, or with ``train`` a whole model, beside other MoE layers.

python -m comet_ds bench --shapes qwen2-moe,mixtral-8x7b
python -m comet_ds bench --ranks 2 --autoep --json result.json
python -m comet_ds bench train --ranks 2
python -m comet_ds bench train --help
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Run ``comet_ds.bench.train`` after ``train``, else ``comet_ds.bench.layers``."""
    if arguments[:1] == ["train"]:
        from comet_ds.bench import train  # needs the checkout's example

        train.main(arguments[1:])
        return
    from comet_ds.bench import layers

    layers.main(arguments)
