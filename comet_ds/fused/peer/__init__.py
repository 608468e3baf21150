# SPDX-License-Identifier: Apache-2.0
"""What ranks on one host share: memory, its layout, barriers, host status."""
