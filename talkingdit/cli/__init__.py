# SPDX-License-Identifier: Apache-2.0
"""The command `talkingdit`: one file for every verb."""
