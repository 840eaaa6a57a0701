# SPDX-License-Identifier: Apache-2.0
"""Metrics by what they look at; each file has a list METRICS."""
