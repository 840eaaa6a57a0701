# SPDX-License-Identifier: Apache-2.0
"""The ops: functions on tensors, each with a readable reference ``<name>_reference`` of the same contract.

What is public in a module stands in its ``__all__``; here is a line per module.
"""

# ruff: noqa: F403

from talkingdit.ops._framepack_segments import *
from talkingdit.ops._rope_layout import *
from talkingdit.ops.audio_attention import *
from talkingdit.ops.audio_rope import *
from talkingdit.ops.eight_bit import *
from talkingdit.ops.frame_linear import *
from talkingdit.ops.framepack import *
from talkingdit.ops.gelu_tanh import *
from talkingdit.ops.linear_gelu import *
from talkingdit.ops.modulate import *
from talkingdit.ops.qk_norm_rope3d import *
from talkingdit.ops.rope3d import *
from talkingdit.ops.window_fusion import *
from talkingdit.ops.window_weights import *
