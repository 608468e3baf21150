# SPDX-License-Identifier: Apache-2.0
"""What a run shows: metrics, layer times, the timeline of CTAs."""
