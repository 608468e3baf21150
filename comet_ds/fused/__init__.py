# SPDX-License-Identifier: Apache-2.0
"""The fused path: prepare a call, begin it, run it, on the kernels of csrc."""
