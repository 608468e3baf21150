# SPDX-License-Identifier: Apache-2.0
"""What ranks agree on: set-up, gradients that are needed, and who is late."""
