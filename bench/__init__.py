# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops: ``python -m bench <op>|all|report``, run from the repository."""
