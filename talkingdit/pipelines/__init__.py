# SPDX-License-Identifier: Apache-2.0
"""A video job from its inputs to a file: the one engine of long videos, guidance, solvers, resuming."""
