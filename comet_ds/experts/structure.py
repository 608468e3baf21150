# SPDX-License-Identifier: Apache-2.0
"""ModuleStructure: detects that recognised modules have changed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

from torch import nn

from comet_ds._compat.torch import HOOKS
from comet_ds.bindings import WatchMaker


class ModuleStructure:
    """A snapshot of module trees that is cheap to compare with their present state.

    It holds everything that changes what a recognised module computes, other than its parameters:
    children, hooks, patched forwards of modules and classes, train or eval mode, dropout
    probabilities.

    Args:
        roots: roots of the trees.
        watch: ``ModuleWatch`` of csrc/autograd/module_watch.cpp, which makes the same comparison
            several times faster (64 experts of 4 modules on a slow host take 160 us here); None
            without kernels.
    """

    def __init__(self, roots: Sequence[nn.Module], watch: WatchMaker | None = None) -> None:
        self.roots = list(roots)
        modules = [m for root in self.roots for m in root.modules()]
        self._attributes = [m.__dict__ for m in modules]
        self._hooks = [a[name] for a in self._attributes for name in HOOKS]
        # nn.Module has no __eq__, so comparing these dictionaries compares modules by identity.
        self._children = [m._modules for m in modules]
        self._children_then = [dict(children) for children in self._children]
        self._forwards_then = {cls: cls.forward for cls in set(map(type, modules))}
        self._training_then = [m.training for m in modules]
        self._dropouts = [a for a in self._attributes if "p" in a]
        self._p_then = [a["p"] for a in self._dropouts]
        self._was_plain = self.is_plain()
        self._watch = watch(self._attributes) if watch is not None and self._was_plain else None

    def is_plain(self) -> bool:
        """Return whether no module has hooks or a patched forward."""
        is_patched = map(operator.contains, self._attributes, itertools.repeat("forward"))
        return not any(self._hooks) and not any(is_patched)

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        """Return whether ``roots`` are the modules of the snapshot and have not changed."""
        if self.roots != list(roots):
            return False
        if any(cls.forward is not forward for cls, forward in self._forwards_then.items()):
            return False
        if self._watch is not None:
            return self._watch.is_unchanged()
        return (
            self.is_plain() == self._was_plain
            and self._children == self._children_then
            and list(map(_TRAINING, self._attributes)) == self._training_then
            and [a["p"] for a in self._dropouts] == self._p_then
        )


_TRAINING = operator.itemgetter("training")
