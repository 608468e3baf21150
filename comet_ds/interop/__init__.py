# SPDX-License-Identifier: Apache-2.0
"""Working with user code that replaces, hooks, wraps or traces parts of the layer.

Face:
    overrides.find_overrides, call_gate, class_for    the user's gate, experts and patches
    wrappers.WrapperCheck                             refuses DistributedDataParallel and FSDP
    traced.is_traced, run_traced                      torch.jit.trace and torch.export
    kept.Kept                                         the last forward's loss and expert counts
"""
