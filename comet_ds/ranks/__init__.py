# SPDX-License-Identifier: Apache-2.0
"""Agreement between ranks, none of it specific to one path.

Face:
    setup.agree_on_setup, agree_on_largest   compare or reduce values once, at set-up
    gradients.find_needs, BackwardNeeds      which gradients the backward of a group computes
    waiting.Attendance                       bounded waits that name the rank that is late
"""
