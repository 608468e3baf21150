# SPDX-License-Identifier: Apache-2.0
"""The commands of ``python -m comet_ds``, one module each, and what they share."""
