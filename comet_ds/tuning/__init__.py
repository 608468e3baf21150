# SPDX-License-Identifier: Apache-2.0
"""CTA splits and chunks: hardware rates, a cost model, measured splits, measuring in training."""
