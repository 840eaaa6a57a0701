# SPDX-License-Identifier: Apache-2.0
"""Processes that make one video or train one model together, and how they share the work."""
