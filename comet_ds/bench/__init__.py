# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of layers and whole models, beside other MoE layers."""
