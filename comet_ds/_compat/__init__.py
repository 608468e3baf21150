# SPDX-License-Identifier: Apache-2.0
"""Which torch and DeepSpeed the package works with; checked when it is imported.

Not by pip: a bound from above would make it replace a newer torch that the user has by an older.
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.utils import logger
from packaging.version import Version

OLDEST_TORCH, NEWEST_TESTED_TORCH = (2, 11), (2, 14)
OLDEST_DEEPSPEED, NEWEST_TESTED_DEEPSPEED = (0, 19, 6), (0, 19, 8)


def check_version(
    name: str, version: str, oldest: tuple[int, ...], newest_tested: tuple[int, ...]
) -> str | None:
    """Return a sentence on a version that is newer than those tested, None for others.

    Pre-releases count as the release they come before: NVIDIA's containers have "2.11.0a0+...".

    Raises:
        ImportError: the version is older than the package needs.
    """
    release = Version(version).release
    dotted, tested = (".".join(map(str, bound)) for bound in (oldest, newest_tested))
    if release < oldest:
        remedy = f'pip install "{name}>={dotted}"'
        raise ImportError(f"comet_ds needs {name} {dotted} or later, got {version}: {remedy}")
    if release[: len(newest_tested)] > newest_tested:
        return f"{name} {version} is newer than comet_ds was tested with ({dotted} to {tested})"
    return None


for _sentence in (
    check_version("torch", torch.__version__, OLDEST_TORCH, NEWEST_TESTED_TORCH),
    check_version("deepspeed", deepspeed.__version__, OLDEST_DEEPSPEED, NEWEST_TESTED_DEEPSPEED),
):
    if _sentence is not None:
        logger.warning(_sentence)
