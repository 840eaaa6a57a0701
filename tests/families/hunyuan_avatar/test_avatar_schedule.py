# SPDX-License-Identifier: Apache-2.0
"""Length, windows, guidance and sounds of a video are those of the released program, whose loop gave the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import write_lossless
from safetensors import safe_open
from torch import Tensor

from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.checkpoint import HunyuanAvatarSettings
from talkingdit.families.hunyuan_avatar.guidance import GuidanceView, StepGuidance
from talkingdit.families.hunyuan_avatar.masks import moving_mask, small_masks
from talkingdit.families.hunyuan_avatar.options import Options
from talkingdit.families.hunyuan_avatar.outline import PlacedVoice, outline, stages_of, video_length
from talkingdit.families.hunyuan_avatar.pipeline import noise_levels
from talkingdit.families.hunyuan_avatar.speakers import Speaker
from talkingdit.families.hunyuan_avatar.step_cache import TeaSteps, computes
from talkingdit.families.hunyuan_avatar.windows import VideoConditions, cell_masks, masks_of, sound_frames
from talkingdit.pipelines.inputs import Inputs, Job
from talkingdit.pipelines.long_video import ShiftFusion, denoise
from talkingdit.pipelines.step_cache import Fitted

GOLDEN = Path(__file__).parents[2] / "golden" / "long_video.safetensors"


@pytest.mark.parametrize("case", ["hunyuan_short", "hunyuan_long", "hunyuan_cfg12"])
def test_the_released_loop(case: str) -> None:
    """Its stub denoiser, fed with our windows of sound, guidance and noise levels; begun again at every stage."""
    with safe_open(GOLDEN, "pt") as file:
        setting = json.loads(file.metadata()["spec"])["cases"][case]
        audio, start, sigmas, expected = (
            file.get_tensor(f"{case}/{name}").float() for name in ("in/audio", "in/latents", "in/sigmas", "out/latents")
        )
    # The released number counts five empty frames behind a voice of more than 129.
    heard = setting["audio_frames"]
    frames = heard if heard <= 129 else heard - 5
    length = video_length(frames * 640, 25, 33)
    assert length.frames == frames
    assert length.latents == setting["infer_length"]
    assert length.kept <= setting["video_length"] == expected.shape[2]
    sound = torch.zeros(4 * length.latents)
    sound[:heard] = audio[0]
    steps = setting["steps"]
    guidance = StepGuidance(steps, start=setting["start_cfg_scale"] if setting["cfg"] else 1.0)
    assert torch.allclose(noise_levels(steps, setting["flow_shift"]), sigmas, atol=1e-6)

    def predict(window: Tensor, frames: Tensor, step: int) -> list[Tensor]:
        mask = 0.75 * (guidance.mask_at(step) if setting["cfg"] else 1.0)
        slots = torch.arange(33).view(1, 33, 1, 1) / 32 - 0.5
        base = 0.35 * window + 0.25 * window.mean(1, keepdim=True) + 0.2 * slots + 0.1 * mask
        samples = sound[sound_frames(frames, length.latents)]
        tokens = torch.cat([samples[:1].expand(3), samples]).view(33, 4).mean(1).view(1, 33, 1, 1)
        views = guidance.views(step)
        return [base + 0.3 * tokens * v.audio + 0.15 * (0.5 if v.text else -0.5) for v in views]

    x, begin = start[0, :, : length.latents], 0
    for end in stages_of(steps):
        plan = ShiftFusion(33, 33, 10)
        x = denoise(x, sigmas[: end + 1], plan, predict, guidance.coefficients, begin=begin)
        begin = end
    found = x[None, :, : expected.shape[2]]
    assert (found - expected).pow(2).mean().sqrt() < 1e-6 * expected.pow(2).mean().sqrt()


def test_the_released_schedule() -> None:
    guidance = StepGuidance(50)
    assert guidance.views(9) == (GuidanceView(text=False, audio=False), GuidanceView(text=True, audio=True))
    assert guidance.views(10) == (GuidanceView(text=True, audio=False), GuidanceView(text=True, audio=True))
    for step, scale in ((0, 7.5), (9, 41 / 50 * 5.5 + 2), (10, 40 / 50 * 3 + 3.5), (49, 1 / 50 * 3 + 3.5)):
        assert guidance.coefficients(step) == pytest.approx([1 - scale, scale])
    assert (guidance.mask_at(9), guidance.mask_at(10)) == (0.6, 1.0)
    assert StepGuidance(50, start=1.0).views(20) == (GuidanceView(text=True, audio=True),)
    assert StepGuidance(50, start=1.0).coefficients(20) == [1.0]


def test_separate_strengths() -> None:
    """v_00 + g_text (v_t0 - v_00) + g_audio (v_ta - v_t0), and no prediction that has no weight."""
    values = {
        GuidanceView(text=True, audio=True): 5.0,
        GuidanceView(text=True, audio=False): 3.0,
        GuidanceView(text=False, audio=False): 1.0,
    }
    for text, audio, count in ((4.0, 6.0, 3), (1.0, 3.0, 2), (2.0, 2.0, 2), (None, 3.0, 2), (3.0, None, 3)):
        guidance = StepGuidance(20, text=text, audio=audio)
        got = sum(w * values[v] for w, v in zip(guidance.coefficients(3), guidance.views(3), strict=True))
        assert got == pytest.approx(1 + (text or 1) * 2 + (audio or 1) * 2)
        assert guidance.predictions == count
        assert guidance.views(0) == guidance.views(19)
    with pytest.raises(ValueError, match="text_guidance must be a number of at least 0, got -1"):
        StepGuidance(20, text=-1.0)


def test_lengths() -> None:
    """Of a voice of whole frames: all are shown, and windows are 33 latents until 129 frames are not enough."""
    for frames, latents, kept in ((1, 33, 1), (2, 33, 2), (5, 33, 2), (129, 33, 33), (130, 65, 34), (250, 65, 64)):
        length = video_length(frames * 640, 25, 33)
        assert (length.frames, length.latents, length.kept) == (frames, latents, kept)
    assert video_length(641, 25, 33).frames == 2  # a frame for every beginning of one
    short = video_length(30 * 640, 25, 5)  # with a window of 5: 17 frames at once
    assert (short.latents, short.kept) == (13, 9)
    assert video_length(16 * 640, 25, 5).latents == 5


def test_windows_hear_their_frames_around_the_end_of_the_video() -> None:
    assert sound_frames(torch.tensor([0, 1, 2]), 5).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert sound_frames(torch.tensor([4, 0, 1]), 5).tolist() == [16, 17, 18, 19, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("still", "begins", "goes_on", "wraps"),
    [("window", [0, 1, 2], [0, 1, 2], [0, 1, 2]), ("video", [0, 1, 2], [2, 3, 3], [3, 0, 1])],
)
def test_the_still_picture_begins_with_the_window_or_with_the_video(
    still: str, begins: list[int], goes_on: list[int], wraps: list[int]
) -> None:
    """Released models are given it from its beginning in every window; drawn ones are told where they are by it."""
    conditions = object.__new__(VideoConditions)
    object.__setattr__(conditions, "reference", torch.arange(4.0).view(1, 1, 4, 1, 1))
    object.__setattr__(conditions, "still", still)
    for frames, expected in (([0, 1, 2], begins), ([2, 3, 4], goes_on), ([6, 0, 1], wraps)):
        assert conditions.still_latents(torch.tensor(frames)).flatten().tolist() == expected


def test_a_voice_that_is_being_spoken_is_refused(tmp_path: Path) -> None:
    job = Job(image=tmp_path / "a.png", audio=Path("-"), output=tmp_path / "out.mp4")
    inputs = Inputs(job, np.zeros((64, 64, 3), np.uint8), np.zeros(1600, np.float32))
    with pytest.raises(UserError, match="audio -: HunyuanVideo-Avatar makes all of a video together"):
        outline(inputs, HunyuanAvatarSettings(), Options())


def test_stages_hold_all_steps() -> None:
    for steps in (1, 2, 9, 10, 11, 49, 50):
        ends = stages_of(steps)
        assert ends[-1] == steps
        assert len(ends) <= 10
        assert list(ends) == sorted(set(ends))
        assert all(computes(end, steps) for end in stages_of(steps, "released")[:-1])
    assert stages_of(50, "released") == stages_of(50)  # where the released cache computes, too
    assert stages_of(50, 0.1) == (10, 20, 30, 40, 50)  # a stage begins computed
    assert stages_of(9, 0.1) == (9,)


def test_steps_are_skipped_while_their_inputs_change_little() -> None:
    """Every change of the input counts 0.1, of which three make the threshold; what begins anew is computed."""
    fitted = Fitted((1.0, 0.0), first=2, last=1)  # the change itself

    def decisions(begin: int, end: int, breaks: tuple[int, ...] = ()) -> str:
        tea = TeaSteps(
            lambda x, step: x, torch.full((4,), 1.1**begin), 0.25, fitted, begin=begin, end=end, steps=20, breaks=breaks
        )  # fmt: skip
        assert tea.computed(0)  # asked of every plan
        found = ""
        for step in range(begin, end):
            assert tea.computed(step) == tea.computed(step)
            found += "C" if tea.computed(step) else "-"
            tea.after(torch.full((4,), 1.1 ** (step + 1)))
        return found

    assert decisions(0, 20) == "CC--C--C--C--C--C--C"
    assert decisions(10, 20) == "C--C--C--C"
    assert decisions(10, 19) == "C--C--C--"
    assert decisions(0, 10, breaks=(6,)) == "CC--C-C--C"


def test_masks_are_interpolated_to_latents() -> None:
    mask = torch.zeros(32, 48)
    mask[8:24, 16:32] = 1
    found = small_masks([mask.numpy()], (4, 6))
    assert found.shape == (1, 1, 1, 4, 6)
    assert torch.equal(found[0, 0, 0, 1:3, 2:4], torch.ones(2, 2))
    assert found.sum() == 4


def test_a_mask_that_is_a_video_moves_with_the_frames(tmp_path: Path) -> None:
    """At another rate than the video that is made, and shorter."""
    path = tmp_path / "mask.mkv"
    frames = np.zeros((12, 32, 48, 3), np.uint8)
    for number, frame in enumerate(frames):
        frame[8:24, 8 * (number // 2) : 8 * (number // 2) + 8] = 255  # a cell to the right every two frames
    write_lossless(path, frames, 50)
    speaker = Speaker("anna", mask=path)
    found = moving_mask(speaker, latents=4, fps=25, size=(32, 48))
    assert found.shape == (4, 4, 6)
    lit = [np.flatnonzero(cells[1] > 0.9).tolist() for cells in found]
    assert lit == [[0], [1, 2, 3, 4], [5], [5]]  # frame 0, frames 1 to 4, frame 5, and the last stays
    assert not found[:, 0].any()


def test_windows_see_the_masks_of_their_frames() -> None:
    still = PlacedVoice(Speaker("a"), np.zeros(1, np.float32), np.ones((32, 48), np.float32))
    moving = np.arange(5, dtype=np.float32)[:, None, None].repeat(4, 1).repeat(6, 2)
    voices = [still, replace(still, moving=moving)]
    masks = cell_masks(voices, (4, 6))
    assert masks.shape == (1, 2, 5, 4, 6)
    window = masks_of(masks, torch.tensor([3, 4, 0]))
    assert window[0, :, :, 0, 0].tolist() == [[1, 1, 1], [3, 4, 0]]
    alone = cell_masks([still], (4, 6))
    assert torch.equal(masks_of(alone, torch.tensor([3, 4, 0])), alone)
