# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V clips against a plain re-telling of the official loop: everything decoded, nothing kept or shared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_s2v import AUDIO_DIM, LAYERS, make_s2v
from torch import Tensor

from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.options import Options
from talkingdit.families.wan_s2v.outline import Sampling
from talkingdit.families.wan_s2v.pipeline import VideoConditions, WanS2VPipeline
from talkingdit.media.colour import colours
from talkingdit.pipelines.inputs import Frames
from talkingdit.pipelines.long_video import Carry, GeneratedClip, generate_clips
from talkingdit.pipelines.solvers import flow_solver

HEIGHT, WIDTH = 64, 64


@pytest.fixture(scope="module")
def checkpoint() -> WanS2VCheckpoint:
    return make_s2v()


@pytest.fixture(scope="module")
def image() -> Frames:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def voice(frames: int) -> Tensor:
    return torch.randn(LAYERS, AUDIO_DIM, frames, generator=torch.Generator().manual_seed(7))


def official(
    checkpoint: WanS2VCheckpoint,
    image: Frames,
    audio: Tensor,
    clips: int,
    infer_frames: int,
    prompt: str,
    negative: str,
    seed: int,
    guidance: float,
    solver: str,
    init_first_frame: bool = False,
    pose: Tensor | None = None,
) -> list[Tensor]:
    """The loop of the official program, told plainly: frames of every clip as it returns them."""
    model, vae = checkpoint.transformer, checkpoint.vae
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))

    def encode(video: Tensor) -> Tensor:
        return (vae.encode(video).latent_dist.mode() - mean) / std

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents * std + mean).sample.clamp(-1, 1)

    text, null = (checkpoint.text_encoder.encode([words]).features for words in (prompt, negative))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
    reference = encode(pixels)
    last_frames = torch.zeros(1, 3, 73, HEIGHT, WIDTH)
    drop_first = not init_first_frame
    if init_first_frame:
        last_frames[:, :, -6:] = pixels
    motion = encode(last_frames)
    done = []
    for r in range(clips):
        generator = torch.Generator().manual_seed(seed + r)
        frames = (infer_frames + 3 + 73) // 4 - 19
        x = torch.randn(16, frames, HEIGHT // 8, WIDTH // 8, generator=generator)[None]
        if pose is None:
            cond = torch.zeros(1, 16, frames, HEIGHT // 8, WIDTH // 8)
        else:
            shown = pose[:, :, r * infer_frames : (r + 1) * infer_frames]
            cond = encode(torch.cat([shown[:, :, :1], shown], dim=2))[:, :, 1:]
        sound = audio[None, ..., r * infer_frames : (r + 1) * infer_frames]
        steps = flow_solver(solver, checkpoint.settings.steps, checkpoint.settings.shift)
        for t in steps.timesteps:
            given: dict[str, Any] = {"reference": reference, "history": motion, "pose": cond}
            given["drop_history"] = drop_first and r == 0
            c = model(x, t[None].float(), WanInputs(text, audio=sound, **given))
            if guidance > 1:
                u = model(x, t[None].float(), WanInputs(null, audio=0.0 * sound, **given))
                c = u + guidance * (c - u)
            x = steps.step(c, t, x, return_dict=False)[0]
        if drop_first and r == 0:
            video = decode(torch.cat([reference, x], dim=2))[:, :, -infer_frames:][:, :, 3:]
        else:
            video = decode(torch.cat([motion, x], dim=2))[:, :, -infer_frames:]
        overlap = min(73, video.shape[2])
        last_frames = torch.cat([last_frames[:, :, overlap:], video[:, :, -overlap:]], dim=2)
        motion = encode(last_frames)
        done.append(video)
    return done


def difference(video: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, in parts of that of the wanted video."""
    return float((video - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (of the pipeline, of the official loop)
    "80 frames, unipc": ({}, {}),
    "40 frames, history of three clips": ({"clip_frames": 40}, {"infer_frames": 40, "clips": 3}),
    "dpm++, one pass after the other": (
        {"solver": "dpm++", "sequential": True, "clip_frames": 48},
        {"solver": "dpm++", "infer_frames": 48},
    ),
    "started from the reference": (
        {"start_from_reference": True, "clip_frames": 20},
        {"init_first_frame": True, "infer_frames": 20},
    ),
    "no guidance": ({"guidance": 1.0, "clip_frames": 16}, {"guidance": 1.0, "infer_frames": 16}),
}


def conditions(
    pipeline: WanS2VPipeline,
    image: Frames,
    prompt: str,
    features: Tensor,
    frames: int | None = None,
    pose: Any = None,
    **options: Any,
) -> VideoConditions:
    sampling = Sampling.of(Options(**options), pipeline.settings)
    return pipeline.conditions(image, prompt, sampling, features, audio_frames=frames, pose=pose)


def clips(
    pipeline: WanS2VPipeline, video: VideoConditions, first: int = 0, carry: Carry | None = None
) -> list[GeneratedClip]:
    return list(generate_clips(pipeline, video, video.clips, first, carry))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_clips_equal_the_official_loop(checkpoint: WanS2VCheckpoint, image: Frames, name: str) -> None:
    chosen, told = CASES[name]
    told = {"clips": 2, "infer_frames": 80, "guidance": 4.5, "solver": "unipc"} | told
    frames = told["clips"] * told["infer_frames"]
    wanted = official(checkpoint, image, voice(frames), prompt="a face", negative="ugly hands", seed=3, **told)
    pipeline = WanS2VPipeline(checkpoint)
    video = conditions(pipeline, image, "a face", voice(frames), seed=3, negative_prompt="ugly hands", **chosen)
    made = clips(pipeline, video)
    assert [clip.frames.shape for clip in made] == [video.shape for video in wanted]
    for clip, expected in zip(made, wanted, strict=True):
        assert expected.std() > 0.05
        assert difference(clip.frames, expected) < 1e-5


@torch.no_grad()
def test_a_pose_video_equals_the_official_loop(checkpoint: WanS2VCheckpoint, image: Frames) -> None:
    pose = torch.rand(1, 3, 24, HEIGHT, WIDTH) * 2 - 1
    told = {"clips": 2, "infer_frames": 12, "guidance": 4.5, "solver": "unipc", "prompt": "", "negative": "", "seed": 0}
    wanted = official(checkpoint, image, voice(24), pose=pose, **told)
    pipeline = WanS2VPipeline(checkpoint)
    chosen: dict[str, Any] = {"clip_frames": 12, "negative_prompt": ""}
    posed = conditions(pipeline, image, "", voice(24), pose=pose.split(12, dim=2).__getitem__, **chosen)
    made = clips(pipeline, posed)
    without = clips(pipeline, conditions(pipeline, image, "", voice(24), **chosen))
    for clip, video, other in zip(made, wanted, without, strict=True):
        assert difference(clip.frames, video) < 1e-5
        assert difference(other.frames, video) > 1e-3


@pytest.fixture(scope="module")
def pipeline(checkpoint: WanS2VCheckpoint) -> WanS2VPipeline:
    return WanS2VPipeline(checkpoint)


SHORT: dict[str, Any] = {"clip_frames": 8, "seed": 1}


@torch.no_grad()
def test_a_video_goes_on_from_a_carry_as_if_never_interrupted(pipeline: WanS2VPipeline, image: Frames) -> None:
    video = conditions(pipeline, image, "a face", voice(32), **SHORT)
    whole = clips(pipeline, video)
    for first in (1, 3):
        rest = clips(pipeline, video, first, whole[first - 1].carry)
        assert [clip.index for clip in rest] == list(range(first, 4))
        for again, once in zip(rest, whole[first:], strict=True):
            assert torch.equal(again.frames, once.frames)
    assert whole[-1].carry is None


def test_any_number_of_frames_is_the_beginning_of_the_whole(pipeline: WanS2VPipeline, image: Frames) -> None:
    def make(frames: int) -> Tensor:
        video = conditions(pipeline, image, "a face", voice(24), frames, **SHORT)
        return torch.cat([clip.frames for clip in clips(pipeline, video)], dim=2)

    whole = make(24)
    assert whole.shape[2] == 21  # the first three frames are dropped
    for frames in (4, 11, 22):
        some = make(frames)
        assert some.shape[2] == frames - 3
        torch.testing.assert_close(some, whole[:, :, : frames - 3], rtol=1e-5, atol=1e-5)


def test_voice_words_image_and_seed_each_change_the_video(pipeline: WanS2VPipeline, image: Frames) -> None:
    def make(image: Frames = image, prompt: str = "a face", sign: float = 1.0, **more: Any) -> Tensor:
        video = conditions(pipeline, image, prompt, sign * voice(8), **SHORT | more)
        return clips(pipeline, video)[0].frames

    plain = make()
    assert torch.equal(plain, make())
    others = {
        "voice": make(sign=-1.0),
        "prompt": make(prompt="a tree"),
        "negative": make(negative_prompt="a tree"),
        "image": make(image[::-1].copy()),
        "seed": make(seed=2),
        "shift": make(shift=5.0),
    }
    for name, other in others.items():
        assert (plain - other).abs().max() > 1e-4, name


def test_matched_clips_keep_the_colours_of_the_first(pipeline: WanS2VPipeline, image: Frames) -> None:
    def prepared(match: bool) -> VideoConditions:
        return conditions(pipeline, image, "", voice(24), clip_frames=8, steps=1, match_colour=match)

    matched, plain = clips(pipeline, prepared(True)), clips(pipeline, prepared(False))
    assert torch.equal(matched[0].frames, plain[0].frames)
    anchor = colours(matched[0].frames)
    for after, before in zip(matched[1:], plain[1:], strict=True):
        assert (colours(after.frames) - anchor)[0].norm() < (colours(before.frames) - anchor)[0].norm()
    again = clips(pipeline, prepared(True), 2, matched[1].carry)
    assert torch.equal(again[0].frames, matched[2].frames)


def test_a_long_video_does_not_need_more_memory_per_clip(pipeline: WanS2VPipeline, image: Frames) -> None:
    """What a clip hands on has one size: 19 latents, and pixels only where clips are shorter than the history."""
    for size, kept in ((8, (1, 3, 73, 64, 64)), (76, None)):
        video = conditions(pipeline, image, "", voice(2 * size), clip_frames=size, steps=1)
        carry = pipeline.clip(video, 0).carry
        assert carry is not None
        assert carry["history"].shape == (1, 16, 19, 8, 8)
        assert (carry["window"].shape if "window" in carry else None) == kept


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip_frames": 10}, "a clip must have a multiple of 4 frames, got 10"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"guidance": 0.5}, "guidance must be a number of at least 1, got 0.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"solver": "heun"}, "must be one of unipc, dpm\\+\\+, euler, got 'heun'"),
    ],
)
def test_impossible_sampling(pipeline: WanS2VPipeline, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling.of(Options(**options), pipeline.settings)


def test_impossible_inputs(pipeline: WanS2VPipeline, image: Frames) -> None:
    with pytest.raises(ValueError, match="sides that are multiples of 16, got uint8 of shape \\[60, 64, 3\\]"):
        conditions(pipeline, image[:60], "", voice(8), **SHORT)
    with pytest.raises(ValueError, match="F of at least 16 for 9 > 3 frames"):
        conditions(pipeline, image, "", voice(9), **SHORT)
    with pytest.raises(ValueError, match="for 3 > 3 frames"):
        conditions(pipeline, image, "", voice(8), 3, **SHORT)
    with pytest.raises(ValueError, match="clip 1 needs carry"):
        clips(pipeline, conditions(pipeline, image, "", voice(16), **SHORT), 1)
