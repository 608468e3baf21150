# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed op builders of comet_ds; import them as ``comet_ds.op_builder.<module>``.

Nothing is imported here: with this checkout's root on sys.path, DeepSpeed itself imports a
top-level ``op_builder`` while it is being imported, to see whether it is its own.
"""
