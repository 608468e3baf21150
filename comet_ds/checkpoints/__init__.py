# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as files, without an engine: inspect, consolidate and reshard them.

On disk a checkpoint of comet_ds's layer is one of DeepSpeed's. ``names.py`` counts experts over all
ranks, ``files.py`` finds and reads a checkpoint, ``groups.py`` and ``entries.py`` say what its
optimizer's tensors hold, ``reshard.py`` and ``consolidate.py`` write others, ``command.py`` is the
command line.
"""
