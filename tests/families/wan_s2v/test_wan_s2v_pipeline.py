# SPDX-License-Identifier: Apache-2.0
"""Wan-S2V clips against a plain re-telling of the official loop: everything decoded, nothing kept or shared."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from tiny_s2v import AUDIO_DIM, LAYERS, make_s2v
from torch import Tensor

from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.pipeline import Frames, S2VSampling, WanS2VPipeline
from talkingdit.media.colour import colours
from talkingdit.pipelines.solvers import flow_solver

HEIGHT, WIDTH = 64, 64


@pytest.fixture(scope="module")
def checkpoint() -> WanS2VCheckpoint:
    return make_s2v()


@pytest.fixture(scope="module")
def picture() -> Frames:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def voice(frames: int) -> Tensor:
    return torch.randn(LAYERS, AUDIO_DIM, frames, generator=torch.Generator().manual_seed(7))


def official(
    checkpoint: WanS2VCheckpoint,
    picture: Frames,
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
    """The loop of the official program, told plainly: pictures of every clip as it returns them."""
    model, vae = checkpoint.transformer, checkpoint.vae
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))

    def encode(video: Tensor) -> Tensor:
        return (vae.encode(video).latent_dist.mode() - mean) / std

    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents * std + mean).sample.clamp(-1, 1)

    text, null = (checkpoint.text_encoder.encode([words]).features for words in (prompt, negative))
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 255 * 2 - 1
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
            image = decode(torch.cat([reference, x], dim=2))[:, :, -infer_frames:][:, :, 3:]
        else:
            image = decode(torch.cat([motion, x], dim=2))[:, :, -infer_frames:]
        overlap = min(73, image.shape[2])
        last_frames = torch.cat([last_frames[:, :, overlap:], image[:, :, -overlap:]], dim=2)
        motion = encode(last_frames)
        done.append(image)
    return done


def difference(video: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, in parts of that of the wanted video."""
    return float((video - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (of the pipeline, of the official loop)
    "80 frames, unipc": ({}, {}),
    "40 frames, history of three clips": ({"clip_frames": 40}, {"infer_frames": 40, "clips": 3}),
    "dpm++, one pass after the other": (
        {"solver": "dpm++", "batched": False, "clip_frames": 48},
        {"solver": "dpm++", "infer_frames": 48},
    ),
    "started from the reference": (
        {"start_from_reference": True, "clip_frames": 20},
        {"init_first_frame": True, "infer_frames": 20},
    ),
    "no guidance": ({"guidance": 1.0, "clip_frames": 16}, {"guidance": 1.0, "infer_frames": 16}),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_clips_equal_the_official_loop(checkpoint: WanS2VCheckpoint, picture: Frames, name: str) -> None:
    chosen, told = CASES[name]
    told = {"clips": 2, "infer_frames": 80, "guidance": 4.5, "solver": "unipc"} | told
    frames = told["clips"] * told["infer_frames"]
    wanted = official(checkpoint, picture, voice(frames), prompt="a face", negative="ugly hands", seed=3, **told)
    pipeline = WanS2VPipeline(checkpoint)
    scene = pipeline.scene(picture, "a face", S2VSampling(seed=3, negative_prompt="ugly hands", **chosen))
    made = list(pipeline.clips(scene, voice(frames), frames))
    assert [clip.pictures.shape for clip in made] == [video.shape for video in wanted]
    for clip, video in zip(made, wanted, strict=True):
        assert video.std() > 0.05
        assert difference(clip.pictures, video) < 1e-5


@torch.no_grad()
def test_a_pose_video_equals_the_official_loop(checkpoint: WanS2VCheckpoint, picture: Frames) -> None:
    pose = torch.rand(1, 3, 24, HEIGHT, WIDTH) * 2 - 1
    told = {"clips": 2, "infer_frames": 12, "guidance": 4.5, "solver": "unipc", "prompt": "", "negative": "", "seed": 0}
    wanted = official(checkpoint, picture, voice(24), pose=pose, **told)
    pipeline = WanS2VPipeline(checkpoint)
    scene = pipeline.scene(picture, "", S2VSampling(clip_frames=12, negative_prompt=""))
    made = list(pipeline.clips(scene, voice(24), 24, pose=iter(pose.split(12, dim=2))))
    without = list(pipeline.clips(scene, voice(24), 24))
    for clip, video, other in zip(made, wanted, without, strict=True):
        assert difference(clip.pictures, video) < 1e-5
        assert difference(other.pictures, video) > 1e-3


@pytest.fixture(scope="module")
def short(checkpoint: WanS2VCheckpoint, picture: Frames) -> Any:
    """A pipeline and a scene of clips of 8 pictures."""
    pipeline = WanS2VPipeline(checkpoint)
    return pipeline, pipeline.scene(picture, "a face", S2VSampling(clip_frames=8, seed=1))


@torch.no_grad()
def test_a_video_goes_on_from_a_carry_as_if_never_interrupted(short: Any) -> None:
    pipeline, scene = short
    whole = list(pipeline.clips(scene, voice(32), 32))
    for first in (1, 3):
        rest = list(pipeline.clips(scene, voice(32), 32, first=first, carry=whole[first - 1].carry))
        assert [clip.index for clip in rest] == list(range(first, 4))
        for again, once in zip(rest, whole[first:], strict=True):
            assert torch.equal(again.pictures, once.pictures)
    assert whole[-1].carry is None


def test_any_number_of_frames_is_the_beginning_of_the_whole(short: Any) -> None:
    pipeline, scene = short
    whole = torch.cat([clip.pictures for clip in pipeline.clips(scene, voice(24), 24)], dim=2)
    assert whole.shape[2] == 21  # the first three pictures are dropped
    for frames in (4, 11, 22):
        some = torch.cat([clip.pictures for clip in pipeline.clips(scene, voice(24), frames)], dim=2)
        assert some.shape[2] == frames - 3
        torch.testing.assert_close(some, whole[:, :, : frames - 3], rtol=1e-5, atol=1e-5)


def test_voice_words_picture_and_seed_each_change_the_video(
    checkpoint: WanS2VCheckpoint, picture: Frames, short: Any
) -> None:
    pipeline, scene = short

    def make(voice: Tensor, scene: Any) -> Tensor:
        return next(iter(pipeline.clips(scene, voice, 8))).pictures

    plain, sampling = make(voice(8), scene), S2VSampling(clip_frames=8, seed=1)
    assert torch.equal(plain, make(voice(8), scene))
    others = {
        "voice": make(-voice(8), scene),
        "prompt": make(voice(8), pipeline.scene(picture, "a tree", sampling)),
        "negative": make(
            voice(8), pipeline.scene(picture, "a face", dataclasses.replace(sampling, negative_prompt="a tree"))
        ),
        "picture": make(voice(8), pipeline.scene(picture[::-1].copy(), "a face", sampling)),
        "seed": make(voice(8), pipeline.scene(picture, "a face", dataclasses.replace(sampling, seed=2))),
        "shift": make(voice(8), pipeline.scene(picture, "a face", dataclasses.replace(sampling, shift=5.0))),
    }
    for name, other in others.items():
        assert (plain - other).abs().max() > 1e-4, name


def test_matched_clips_keep_the_colours_of_the_first(checkpoint: WanS2VCheckpoint, picture: Frames) -> None:
    pipeline = WanS2VPipeline(checkpoint)
    sampling = S2VSampling(clip_frames=8, steps=1, match_colour=True)
    scene = pipeline.scene(picture, "", sampling)
    matched = list(pipeline.clips(scene, voice(24), 24))
    free = pipeline.scene(picture, "", dataclasses.replace(sampling, match_colour=False))
    plain = list(pipeline.clips(free, voice(24), 24))
    assert torch.equal(matched[0].pictures, plain[0].pictures)
    anchor = colours(matched[0].pictures)
    for after, before in zip(matched[1:], plain[1:], strict=True):
        assert (colours(after.pictures) - anchor)[0].norm() < (colours(before.pictures) - anchor)[0].norm()
    again = list(pipeline.clips(scene, voice(24), 24, first=2, carry=matched[1].carry))
    assert torch.equal(again[0].pictures, matched[2].pictures)


def test_a_long_video_does_not_need_more_memory_per_clip(checkpoint: WanS2VCheckpoint, picture: Frames) -> None:
    """What a clip hands on has one size: 19 latents, and pixels only where clips are shorter than the history."""
    pipeline = WanS2VPipeline(checkpoint)
    for size, kept in ((8, (1, 3, 73, 64, 64)), (76, None)):
        scene = pipeline.scene(picture, "", S2VSampling(clip_frames=size, steps=1))
        first = next(iter(pipeline.clips(scene, voice(2 * size), 2 * size)))
        assert first.carry is not None
        assert first.carry.history.shape == (1, 16, 19, 8, 8)
        assert (None if first.carry.window is None else first.carry.window.shape) == kept


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        ({"clip_frames": 10}, "a clip must have a multiple of 4 pictures, got 10"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"guidance": 0.5}, "guidance must be a number of at least 1, got 0.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"solver": "euler"}, "must be one of unipc, dpm\\+\\+, got 'euler'"),
    ],
)
def test_impossible_sampling(
    checkpoint: WanS2VCheckpoint, picture: Frames, sampling: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        WanS2VPipeline(checkpoint).scene(picture, "", S2VSampling(**sampling))


def test_impossible_inputs(checkpoint: WanS2VCheckpoint, picture: Frames, short: Any) -> None:
    pipeline, scene = short
    with pytest.raises(ValueError, match="sides that are multiples of 16, got uint8 of shape \\[60, 64, 3\\]"):
        pipeline.scene(picture[:60])
    with pytest.raises(ValueError, match="F of at least 16 for 9 > 3 frames"):
        pipeline.clips(scene, voice(9), 9)
    with pytest.raises(ValueError, match="for 3 > 3 frames"):
        pipeline.clips(scene, voice(8), 3)
    with pytest.raises(ValueError, match="clip 1 needs carry"):
        pipeline.clips(scene, voice(16), 16, first=1)
