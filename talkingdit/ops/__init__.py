# SPDX-License-Identifier: Apache-2.0
"""The ops: functions on tensors, each with a readable reference ``<name>_reference`` of the same contract."""

from talkingdit.ops._rope_layout import RopeLayout, Segment
from talkingdit.ops.rope3d import rope3d, rope3d_reference

__all__ = [
    "RopeLayout",
    "Segment",
    "rope3d",
    "rope3d_reference",
]
