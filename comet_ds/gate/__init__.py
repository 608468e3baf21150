# SPDX-License-Identifier: Apache-2.0
"""Routing: which experts a token goes to, and with which weight."""
