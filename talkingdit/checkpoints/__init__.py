# SPDX-License-Identifier: Apache-2.0
"""Weights in files of any layout: reading, filling modules, names of parameters, scaled numbers, LoRA."""
