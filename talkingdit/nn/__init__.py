# SPDX-License-Identifier: Apache-2.0
"""Modules and functions built on the ops."""

from talkingdit.nn.attention import attention

__all__ = ["attention"]
