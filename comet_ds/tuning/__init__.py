# SPDX-License-Identifier: Apache-2.0
"""CTA splits and chunks: a cost model, a table of measured ones, measuring while a model trains."""
