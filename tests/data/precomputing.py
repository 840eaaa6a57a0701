# SPDX-License-Identifier: Apache-2.0
"""Jobs of `talkingdit precompute` on small videos, and what they leave."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from talkingdit.data import ClipRequest, Sample
from talkingdit.data.cutting import Cutting
from talkingdit.data.encoders import CheckpointEncoders
from talkingdit.data.manifest import read_manifest
from talkingdit.data.precompute import FinishedVideo, PrecomputeJob, precompute, prepare
from talkingdit.data.shards import PrecomputedShards
from talkingdit.families.wan_s2v.clips import encode_clip

SETTINGS = {"fps": 16, "motion_frames": 9, "infer_frames": 16, "size_multiple": 16}
CUTTING = Cutting(clip_frames=16, min_frames=8, max_area=32 * 48, multiple=16)
TENSORS = ("latents", "audio", "text", "reference", "history", "audio_history", "pose")


def make_job(videos: Path, encoders: CheckpointEncoders, out: Path, **changes: Any) -> PrecomputeJob:
    job = PrecomputeJob(read_manifest(videos / "m.jsonl"), encoders, encode_clip, out, CUTTING, shard_bytes=1 << 20)
    return dataclasses.replace(job, **changes)


def run(job: PrecomputeJob, rank: int = 0, world: int = 1) -> list[FinishedVideo]:
    steps: list[FinishedVideo] = []
    prepare(job, rank)
    precompute(job, rank, world, steps.append)
    return steps


def samples(folder: Path) -> dict[str, Sample]:
    source = PrecomputedShards(folder)
    found = [source.sample(i, np.random.default_rng(0), ClipRequest()) for i in range(len(source))]
    assert len({sample.key for sample in found}) == len(found)
    return {sample.key: sample for sample in found}


def assert_same(found: dict[str, Sample], wanted: dict[str, Sample]) -> None:
    assert set(found) == set(wanted)
    for key, sample in found.items():
        for name in TENSORS:
            one, other = getattr(sample, name), getattr(wanted[key], name)
            assert one is other is None or torch.equal(one, other), f"{name} of {key}"
