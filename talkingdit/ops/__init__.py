# SPDX-License-Identifier: Apache-2.0
"""The ops: functions on tensors, each with a readable reference ``<name>_reference`` of the same contract."""

from talkingdit.ops._framepack_segments import framepack_segments
from talkingdit.ops._rope_layout import RopeLayout, Segment
from talkingdit.ops.audio_attention import audio_attention, audio_attention_reference
from talkingdit.ops.frame_linear import frame_linear, frame_linear_reference
from talkingdit.ops.framepack import Bucket, bucket_grid, framepack, framepack_reference, init_bucket_weight
from talkingdit.ops.modulate import (
    gate_residual,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_reference,
    gate_residual_reference,
    norm_modulate,
    norm_modulate_reference,
)
from talkingdit.ops.qk_norm_rope3d import qk_norm_rope3d, qk_norm_rope3d_reference
from talkingdit.ops.rope3d import rope3d, rope3d_reference
from talkingdit.ops.window_fusion import (
    fused_window_step,
    fused_window_step_reference,
    window_fusion,
    window_fusion_reference,
)
from talkingdit.ops.window_weights import (
    counter_weights,
    crossfade_weights,
    fade_curve,
    prefix_weights,
    ramp_weights,
)

__all__ = [
    "Bucket",
    "RopeLayout",
    "Segment",
    "audio_attention",
    "audio_attention_reference",
    "bucket_grid",
    "counter_weights",
    "crossfade_weights",
    "fade_curve",
    "frame_linear",
    "frame_linear_reference",
    "framepack",
    "framepack_reference",
    "framepack_segments",
    "fused_window_step",
    "fused_window_step_reference",
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_reference",
    "gate_residual_reference",
    "init_bucket_weight",
    "norm_modulate",
    "norm_modulate_reference",
    "prefix_weights",
    "qk_norm_rope3d",
    "qk_norm_rope3d_reference",
    "ramp_weights",
    "rope3d",
    "rope3d_reference",
    "window_fusion",
    "window_fusion_reference",
]
