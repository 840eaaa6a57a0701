# SPDX-License-Identifier: Apache-2.0
"""The one exception for mistakes a person at the command line can correct."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input from outside (a file, an option). The message is one sentence: what, where, expected, got.

    The command line prints the message alone, without a traceback.
    """
