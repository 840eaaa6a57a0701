# SPDX-License-Identifier: Apache-2.0
"""What a talking-character video is worth: regions, metrics, protocols, comparisons and reports."""
