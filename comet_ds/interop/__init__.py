# SPDX-License-Identifier: Apache-2.0
"""What users' scripts do to a layer: replace, hook, wrap, copy and trace it."""
