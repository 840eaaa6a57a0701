# SPDX-License-Identifier: Apache-2.0
"""What plans count for HunyuanVideo-Avatar, against counts of the real code."""

from __future__ import annotations

import pytest
import torch
from test_hunyuan_avatar_model import TINY, inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from talkingdit.families.hunyuan_avatar import cost
from talkingdit.families.hunyuan_avatar.conditions import AvatarInputs
from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel
from talkingdit.families.hunyuan_avatar.presets import PRESETS
from talkingdit.plan.clip import ClipShape


def test_parameters_of_the_released_model():
    found = cost.parameters(PRESETS["hunyuan_avatar_13b"])
    assert sum(torch.Size(p.shape).numel() for p in found.values()) == pytest.approx(13.0e9, rel=0.05)


def test_work_is_what_a_counter_counts():
    config = cost.complete(TINY)
    model = HunyuanAvatarModel(**config).eval()
    given = inputs(3, 8, 12, 1, dtype=torch.float32)
    given["text"], given["text_mask"] = torch.randn(1, cost.text_tokens(config), 12), None
    latents, timestep = given.pop("latents"), given.pop("timestep")
    with torch.no_grad():
        conditions = model.encode_conditions(AvatarInputs(**given))
        # The counter knows no fused attention of the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            model(latents, timestep, conditions)
    clip = ClipShape(64, 96, 3, 0, 1, 1, False)
    assert cost.tokens(config, clip) == (72, 96 + cost.text_tokens(config))
    assert cost.flops(config, clip) == pytest.approx(counted.get_total_flops(), rel=0.03)


def test_conditions_are_as_large_as_those_that_are_kept():
    config = cost.complete(TINY)
    model = HunyuanAvatarModel(**config).eval()
    given = inputs(3, 8, 12, 1, dtype=torch.float32)
    given["text"], given["text_mask"] = torch.randn(1, cost.text_tokens(config), 12), None
    with torch.no_grad():
        kept = model.encode_conditions(
            AvatarInputs(**{k: v for k, v in given.items() if k not in ("latents", "timestep")})
        )
    tensors = [kept.text, *kept.reference, *kept.added, kept.audio, kept.audio_weights]
    tensors += [t for memory in kept.audio_memory for t in (memory.k, memory.v)]
    clip = ClipShape(64, 96, 3, 0, 1, 1, False)
    assert cost.conditions(config, clip, cost.Memory(), 4) == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)
