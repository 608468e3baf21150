# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed op builders of comet_ds; import them as ``comet_ds.op_builder.<module>``.

Nothing is imported here: if this checkout's root is on sys.path, DeepSpeed imports this folder as a
top-level ``op_builder`` during its own import, to find out whether it runs from its checkout.
"""
