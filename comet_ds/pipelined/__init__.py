# SPDX-License-Identifier: Apache-2.0
"""The pipelined path: chunks of rows over any process group."""
