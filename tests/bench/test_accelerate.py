# SPDX-License-Identifier: Apache-2.0
"""The benchmark of accelerate() compares two blocks of the same weights, one of them accelerated."""

from __future__ import annotations

import torch

from bench import accelerate, harness


def test_both_sides_compute_the_same_and_one_of_them_with_the_fused_ops():
    seen = []
    for case in accelerate.cases(accelerate.SHAPES["quick"][0], torch.float32, torch.device("cpu")):
        calls = harness.contestants(case, harness.Setting(torch.device("cpu"), quick=True))
        assert calls.keys() == {"ours", "diffusers", "copy"}
        if case.direction == "forward":
            for name in ("ours", "diffusers"):
                with torch.profiler.profile() as profile:
                    calls[name][0]()
                seen.append(any(event.key.startswith("talkingdit::") for event in profile.key_averages()))
    assert seen == [True, False]
