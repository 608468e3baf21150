# SPDX-License-Identifier: Apache-2.0
"""What a training run shows of itself: metrics, FLOP, layer times, the timeline of CTAs."""
