# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's engine and ZeRO with stacked experts."""
