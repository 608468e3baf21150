# SPDX-License-Identifier: Apache-2.0
"""The user's expert modules: calling, recognising and stacking them."""
