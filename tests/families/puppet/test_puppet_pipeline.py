# SPDX-License-Identifier: Apache-2.0
"""Generation with a random checkpoint: what depends on what, and that clips join as one stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint

from talkingdit.families.puppet.options import Options
from talkingdit.families.puppet.outline import outline
from talkingdit.families.puppet.pipeline import PuppetPipeline, clip_noise, schedule
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.media.framing import fit_portrait
from talkingdit.models import load_checkpoint
from talkingdit.pipelines.inputs import Frames, Inputs, Job


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> PuppetPipeline:
    return PuppetPipeline(load_checkpoint(make_checkpoint(tmp_path_factory.mktemp("checkpoint"))))


@pytest.fixture
def portrait() -> Frames:
    return np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def features(pipeline: PuppetPipeline) -> torch.Tensor:
    config = pipeline.checkpoint.transformer.config
    return torch.randn(config.audio_layers, config.audio_dim, 21, generator=torch.Generator().manual_seed(1))


def make(pipeline: PuppetPipeline, *args: Any, **kwargs: Any) -> Frames:
    return np.concatenate(list(pipeline.generate(*args, **kwargs)))


def test_one_picture_per_audio_frame_in_clips_of_the_checkpoint(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor
) -> None:
    steps: list[int] = []
    clips = list(pipeline.generate(portrait, features, progress=lambda: steps.append(1)))
    assert [clip.shape for clip in clips] == [(8, 32, 32, 3), (8, 32, 32, 3), (5, 32, 32, 3)]
    assert all(clip.dtype == np.uint8 for clip in clips)
    assert len(steps) == 3 * pipeline.settings.steps


def test_a_seed_makes_the_same_video_and_another_seed_another(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor
) -> None:
    first, again, other = (make(pipeline, portrait, features, "a", Options(seed=seed)) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_portrait_words_and_voice_each_change_the_video(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor
) -> None:
    options = Options(text_guidance=3.0, audio_guidance=4.0)
    plain = make(pipeline, portrait, features, "a person, happy", options)
    for changed in (
        make(pipeline, portrait[::-1].copy(), features, "a person, happy", options),
        make(pipeline, portrait, -features, "a person, happy", options),
        make(pipeline, portrait, features, "a person, sad", options),
    ):
        assert (plain != changed).any()


def test_what_is_heard_later_does_not_change_earlier_clips(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor
) -> None:
    changed = features.clone()
    changed[..., 16:] += 1.0
    plain, other = (make(pipeline, portrait, f) for f in (features, changed))
    np.testing.assert_array_equal(plain[:16], other[:16])
    assert (plain[16:] != other[16:]).any()


def test_a_long_video_begins_like_a_short_one(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor
) -> None:
    np.testing.assert_array_equal(make(pipeline, portrait, features)[:16], make(pipeline, portrait, features[..., :16]))


def test_sound_beyond_the_last_picture_counts_but_is_not_shown(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor
) -> None:
    np.testing.assert_array_equal(
        make(pipeline, portrait, features, frames=11), make(pipeline, portrait, features)[:11]
    )


def test_features_last_to_the_end_of_the_last_clip(pipeline: PuppetPipeline) -> None:
    voice = np.random.default_rng(0).normal(size=16001).astype(np.float32)
    features, frames = pipeline.features(voice)
    assert (frames, features.shape[2]) == (17, 24)


def test_branches_one_by_one_agree_with_branches_at_once(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor
) -> None:
    together, apart = (
        make(pipeline, portrait, features, "a person", Options(sequential=not batched)).astype(int)
        for batched in (True, False)
    )
    assert np.abs(together - apart).max() <= 2


def test_videos_made_at_once_do_not_disturb_each_other(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor
) -> None:
    alone = make(pipeline, portrait, features)
    one = pipeline.generate(portrait, features)
    other = pipeline.generate(portrait[::-1].copy(), -features, options=Options(seed=9))
    pieces = []
    for piece, _ in zip(one, other, strict=True):
        pieces.append(piece)
    np.testing.assert_array_equal(np.concatenate(pieces), alone)


def test_later_clips_get_the_latents_before_them_as_history(
    pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pipeline.checkpoint.transformer
    seen: list[tuple[Any, ...]] = []
    encode = model.encode_conditions

    def record(inputs: WanInputs, **options: Any) -> Any:
        seen.append((inputs.history, inputs.audio, inputs.audio_history, inputs.reference))
        return encode(inputs, **options)

    monkeypatch.setattr(model, "encode_conditions", record)
    list(pipeline.generate(portrait, features, options=Options(text_guidance=1.0, audio_guidance=1.0)))
    reference = seen[0][3]
    assert seen[0][0] is None
    assert seen[0][2] is None
    assert [given[0].shape[2] for given in seen[1:]] == [3, 5]
    for given in seen[1:]:
        torch.testing.assert_close(given[0][:, :, :1], reference)
        torch.testing.assert_close(given[3], reference)
    torch.testing.assert_close(seen[2][0][:, :, :3], seen[1][0])
    torch.testing.assert_close(seen[1][1][0], features[..., 8:16])
    torch.testing.assert_close(seen[2][2][0], features[..., 8:16])
    torch.testing.assert_close(seen[2][1][0, ..., :5], features[..., 16:])
    torch.testing.assert_close(seen[2][1][0, ..., 5:], features[..., -1:].expand(-1, -1, 3))


def test_noise_of_a_clip_depends_on_seed_and_clip_only() -> None:
    shape = (1, 2, 3, 4, 5)
    torch.manual_seed(11)
    first = clip_noise(shape, 3, 1)
    torch.manual_seed(12)
    torch.testing.assert_close(clip_noise(shape, 3, 1), first, rtol=0, atol=0)
    for other in (clip_noise(shape, 1, 3), clip_noise(shape, 3, 2), clip_noise(shape, 4, 1)):
        assert (other != first).all()


def test_the_schedule_is_the_shifted_straight_line() -> None:
    s = np.linspace(1, 0, 6)
    np.testing.assert_allclose(schedule(5, 3.0), 3 * s / (1 + 2 * s), atol=1e-6)


@pytest.mark.parametrize(("shape", "cut"), [((40, 64, 3), True), ((96, 50, 3), True), ((64, 64, 3), False)])
def test_the_middle_square_of_a_portrait_is_kept(shape: tuple[int, int, int], cut: bool) -> None:
    image = np.zeros(shape, np.uint8)
    side = min(shape[:2])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    image[top : top + side, left : left + side] = 200
    square, cropped = fit_portrait(image, 32)
    assert square.shape == (32, 32, 3)
    assert (square == 200).all()
    assert cropped == cut


def test_wrong_input_is_named_at_the_call(pipeline: PuppetPipeline, portrait: Frames, features: torch.Tensor) -> None:
    def refused(*args: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            pipeline.generate(*args)

    refused(portrait[:16], features, match=r"portrait must be uint8 of shape \[32, 32, 3\], got uint8 of shape \[16,")
    refused(portrait.astype(np.float32), features, match="portrait must be uint8")
    refused(portrait, features[:, :3], match=r"features must have shape \[2, 160, F >= 1\], got \[2, 3, 21\]")
    refused(portrait, features[..., :0], match="F >= 1")
    with pytest.raises(ValueError, match="frames must be 1 to 21, as the features are, got 22"):
        pipeline.generate(portrait, features, frames=22)
    for values, match in (({"steps": 0}, "steps must be at least 1, got 0"), ({"seed": -1}, "seed must be at least 0")):
        with pytest.raises(ValueError, match=match):
            Options(**values)


def test_what_has_no_effect_is_told(pipeline: PuppetPipeline, portrait: Frames) -> None:
    def told(prompt: str = "", **options: Any) -> str:
        job = Job(image=Path("face.png"), audio=Path("voice.wav"), output=Path("out.mp4"), prompt=prompt)
        inputs = Inputs(job, portrait, 0.1 * np.sin(np.arange(16000) * 0.1).astype(np.float32))
        video = outline(inputs, pipeline.settings, Options(**options))
        return " ".join((*video.warnings, *pipeline.warnings(inputs, video)))

    assert told("a person") == told() == ""
    assert told("a person", text_guidance=0.0) == "`--prompt` has no effect at text guidance 0."
    assert told(text_guidance=3.0) == "`--text-guidance` has no effect without `--prompt`."
    assert "one prediction" in told(text_guidance=1.0, audio_guidance=1.0, sequential=True, prompt="a person")
    room = pipeline.checkpoint.text_encoder.config.text_len - 1
    assert told(" ".join(["person"] * room)) == ""
    assert f"its last 2 words are cut off, from {'red'!r} on." in told(" ".join(["person"] * room + ["red", "hair"]))
    assert "its last word is cut off, from 'red' on." in told(" ".join(["person"] * room + ["red"]))
