# SPDX-License-Identifier: Apache-2.0
"""What tests share. Ranks and other processes import it too: ``tests`` is on their ``sys.path``."""
