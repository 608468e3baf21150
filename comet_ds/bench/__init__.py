# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of layers and whole models against other MoE layers."""
