# SPDX-License-Identifier: Apache-2.0
"""Puppets as a source: videos are drawn once, and every clip comes with its own audio, past, mouth and words."""

import dataclasses
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from talkingdit.data.sample import ClipRequest
from talkingdit.errors import UserError
from talkingdit.families.puppet import drawn
from talkingdit.families.puppet.drawn import DrawnVideos, Puppets, encode_video, mouth_cells, precompute, read_voices
from talkingdit.puppets import MODEL
from training.loader import Loader
from training.sections import BatchConfig, ConditionsConfig, StageConfig
from training.vae import VaeConfig, make_vae

FIRST, LATER = (ClipRequest(history=history) for history in (False, True))
LONG, SHORT = 43, 13  # latents of videos of 169 and 49 frames


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Videos whose numbers tell what they are: latent k of video v is [v, k, k, ...], audio column j is 256 v + j."""
    folder = tmp_path_factory.mktemp("cache")
    videos = 0
    for kind, count, latents in (("long", 2, LONG), ("short", 3, SHORT)):
        numbers = torch.arange(videos, videos + count).float()
        time = torch.arange(latents).float()
        values = time.repeat(count, 16, 1)
        values[:, 0] = numbers[:, None]
        columns = 256 * numbers[:, None] + torch.arange(4 * (latents - 1)).float()
        tensors = {
            "latents": values[..., None, None].expand(-1, -1, -1, 4, 6).to(torch.bfloat16).contiguous(),
            "cells": (time % 2 == 1)[None, :, None, None].expand(count, latents, 4, 6).contiguous(),
            "audio": columns[:, None, None].expand(count, 2, 5, -1).to(torch.float16).contiguous(),
        }
        captions = [f"video {v}" for v in range(videos, videos + count)]
        save_file(tensors, folder / f"{kind}.safetensors", metadata={"captions": json.dumps(captions)})
        videos += count
    (folder / "stamp.json").write_text(json.dumps({"long": 2, "short": 3, "size": 48, "fps": 16, "seed": 0, "vae": 1}))
    return folder


def place(sample):
    """(video, first latent) of a clip of the cache above."""
    return int(sample.latents[0, 0, 0, 0]), int(sample.latents[1, 0, 0, 0])


def draws(source, clip, count=400):
    rng = np.random.default_rng(0)
    return [source.sample(int(rng.integers(len(source))), rng, clip) for _ in range(count)]


def test_every_latent_of_a_clip_comes_with_its_own_audio_and_past(cache):
    source = Puppets(cache, clip_latents=8, audio_context=8)
    for sample in draws(source, LATER, 60):
        video, start = place(sample)
        assert sample.latents.shape == (16, 8, 4, 6)
        assert sample.latents.dtype == sample.audio.dtype == torch.float32
        assert sample.latents[3, :, 1, 2].tolist() == [start + k for k in range(8)]
        # Latent k shows frames 4k-3 .. 4k, which are audio frames 4(k-1) .. 4(k-1)+3.
        assert sample.audio[1, 2].tolist() == [256 * video + 4 * (start - 1) + j for j in range(32)]
        assert sample.audio_history[1, 2].tolist() == [256 * video + 4 * (start - 1) - 8 + j for j in range(8)]
        assert sample.history[5, :, 1, 2].tolist() == [max(k, 0) for k in range(start - 19, start)]
        assert sample.history[0, :, 1, 2].tolist() == [video if k >= 0 else 0 for k in range(start - 19, start)]
        assert sample.reference[:2, 0, 0, 0].tolist() == [video, 0]
        assert sample.regions["mouth"][:, 0, 0].tolist() == [float((start + k) % 2 == 1) for k in range(8)]
        assert (sample.caption, sample.source, sample.kind) == (f"video {video}", "puppets", "video")


def test_a_clip_that_begins_a_video_has_no_past(cache):
    source = Puppets(cache, clip_latents=8, audio_context=8)
    for sample in draws(source, FIRST, 20):
        video, start = place(sample)
        assert start == 1
        assert sample.history is None
        assert sample.audio_history is None
        assert sample.audio[0, 0, 0] == 256 * video
        assert sample.audio.shape == (2, 5, 32)


@pytest.mark.parametrize("context", [0, 6, 8])
def test_clips_are_drawn_as_often_as_a_video_has_places_for_them_and_evenly_within(cache, context):
    source = Puppets(cache, clip_latents=8, audio_context=context)
    assert Counter(source.video(i)[2] for i in range(len(source))) == {LONG: 2 * (LONG - 8), SHORT: 3 * (SHORT - 8)}
    starts = Counter(place(sample) for sample in draws(source, LATER, 1500))
    before = -(-context // 4)
    for video in range(5):
        latents = LONG if video < 2 else SHORT
        mine = {start: n for (v, start), n in starts.items() if v == video}
        assert sorted(mine) == list(range(1 + before, latents - 8 + 1))
        share = (latents - 8) / len(source)
        assert sum(mine.values()) == pytest.approx(1500 * share, abs=4 * (1500 * share) ** 0.5)


def test_other_durations_than_the_usual_one_can_be_asked_for(cache):
    source = Puppets(cache, clip_latents=8, audio_context=8)
    at = next(i for i in range(len(source)) if source.video(i)[2] == SHORT)
    assert source.shape(at).frames == SHORT - 1 - 2
    for frames in (1, 10):
        sample = source.sample(at, np.random.default_rng(0), ClipRequest(frames, history=True))
        assert sample.audio.shape[-1] == 4 * frames
    for clip in (ClipRequest(11), ClipRequest(8, height=6)):
        with pytest.raises(ValueError, match=r"clip of video short/0 has at most 10 x 4 x 6 latents, asked for"):
            source.sample(at, np.random.default_rng(0), clip)


def test_the_loader_keeps_the_share_of_first_clips_in_stacks_of_their_own(cache):
    source = pickle.loads(pickle.dumps(Puppets(cache, clip_latents=8, audio_context=8)))
    batch = BatchConfig(count=2, size=4)
    stage = StageConfig(steps=100, mix={"puppets": 1}, batch=batch, conditions=ConditionsConfig(first_clip=0.3))
    loader = Loader({"puppets": source}, stage, 0, workers=1)
    stacks = [b for _ in range(25) for b in next(loader)]
    loader.close()
    first = [{sample.history is None for sample in stack.samples} for stack in stacks]
    assert all(len(kinds) == 1 for kinds in first)
    assert first.count({True}) == 15
    assert {tuple(s.latents.shape) for stack in stacks for s in stack.samples} == {(16, 8, 4, 6)}


def test_a_cache_that_is_not_complete_gets_one_sentence(cache, tmp_path):
    with pytest.raises(ValueError, match=r"holds no complete set of drawn videos \(stamp.json is missing\)"):
        Puppets(tmp_path, 8, 8)
    with pytest.raises(ValueError, match=r"no video in .* is longer than 43 latents"):
        Puppets(cache, 43, 8)


def speech_like(seconds, seed):
    """Syllables of a buzzing voice with pauses, 16 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(16000 * seconds)) / 16000
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 25))
    knots = rng.random(int(seconds * 5) + 2) * (rng.random(int(seconds * 5) + 2) > 0.25)
    return (0.1 * buzz * np.interp(t * 5, np.arange(len(knots)), knots)).astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One voice, an untrained autoencoder, and two videos drawn with them."""
    root = tmp_path_factory.mktemp("world")
    soundfile.write(root / "0.flac", speech_like(12, 0), 16000)
    (root / "index.jsonl").write_text(json.dumps({"path": "0.flac", "speaker": "s0", "split": "train"}))
    torch.manual_seed(0)
    make_vae(VaeConfig(base_dim=4, dim_mult=(1, 1, 1))).save_pretrained(root / "vae")
    videos = DrawnVideos(
        voices=root, vae=root / "vae", cache=root / "cache", long_videos=1, short_videos=1, size=96, fps=16
    )
    precompute(videos, 0)
    return videos


def test_drawn_videos_are_read_back_with_the_voice_they_were_drawn_to(world):
    source = Puppets(world.cache, clip_latents=8, audio_context=8)
    (voice,) = read_voices(world.voices, "train", world.fps)
    assert (len(source), source.fps) == (LONG - 8 + SHORT - 8, 16.0)
    for index in (0, len(source) - 1):
        sample = source.sample(index, np.random.default_rng(0), LATER)
        heard = torch.cat([sample.audio_history, sample.audio], dim=-1)
        places = voice.features.half().float().unfold(-1, heard.shape[-1], 1).movedim(2, 0)
        assert (places == heard).all(dim=(1, 2, 3)).any()
        assert sample.latents.shape == (16, 8, 12, 12)
        assert 0 < sample.regions["mouth"].mean() < 0.5


def test_videos_are_drawn_anew_only_when_something_changed(world, monkeypatch):
    def refuse(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(drawn, "_draw", refuse)
    stamp = world.cache / "stamp.json"
    written = stamp.read_text()
    assert set(json.loads(written)) == {"long", "short", "size", "fps", "seed", "vae"}  # caches that people have
    precompute(world, 0)
    with pytest.raises(AssertionError, match="drawn again"):
        precompute(world, 1)
    assert not stamp.exists()
    stamp.write_text(written)


def test_normalised_latents_are_the_encoder_output_in_units_of_its_spread(world):
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(world.vae)
    frames = np.random.default_rng(0).integers(0, 255, (5, 96, 96, 3), np.uint8)
    with torch.no_grad():
        plain = encode_video(vae, frames)
        vae.register_to_config(latents_mean=[1.0] * 16, latents_std=[2.0] * 16)
        torch.testing.assert_close(encode_video(vae, frames), (plain - 1) / 2)


def test_mouth_cells_cover_the_box_of_each_latents_frames():
    boxes = np.tile(np.array([[0.40, 0.50, 0.60, 0.70]]), (9, 1))
    boxes[6] = [0.0, 0.0, 0.1, 0.1]
    cells = mouth_cells(boxes, 12)
    assert cells.shape == (3, 12, 12)
    assert cells[0].sum() == cells[1].sum() == 4 * 3  # columns 4..7, rows 6..8
    assert cells[2, 0, 0]
    assert not cells[1, 0, 0]


def test_missing_voices_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"index\.jsonl does not exist: make it with"):
        read_voices(tmp_path, "train", 16)
    (tmp_path / "index.jsonl").write_text("")
    with pytest.raises(ValueError, match="lists no voice of split 'train'"):
        read_voices(tmp_path, "train", 16)


def test_two_runs_do_not_draw_into_one_cache(tmp_path, monkeypatch):
    """Videos of the one under the settings of the other would be trained on without a word."""
    places = {"voices": tmp_path, "vae": MODEL / "vae", "cache": tmp_path / "cache"}
    videos = DrawnVideos(**places, long_videos=1, short_videos=1, size=48, fps=16)
    others, drawing = dataclasses.replace(videos, size=64), []

    def read(*given):  # the other run comes by while this one draws
        drawing.append(given)
        if len(drawing) == 1:
            with pytest.raises(UserError, match=r"cache: another run \(drawing of training videos, process"):
                precompute(others)
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn, "read_voices", read)
    for mine in (videos, others):  # once the first is gone, the other one's turn comes
        with pytest.raises(KeyboardInterrupt):
            precompute(mine)
    assert len(drawing) == 2
    assert list((tmp_path / "cache").iterdir()) == []
