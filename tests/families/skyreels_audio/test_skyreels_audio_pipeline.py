# SPDX-License-Identifier: Apache-2.0
"""Dubbing and animation, from a folder and files to an .mp4: what stays, what changes, and that it goes on."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from tiny_skyreels import make_skyreels, scene, write_scene

from talkingdit import families
from talkingdit.cli.main import main
from talkingdit.families.skyreels_audio.known import masked_clip
from talkingdit.families.skyreels_audio.options import Options
from talkingdit.families.skyreels_audio.outline import outline
from talkingdit.media.colour import ColourUnifier
from talkingdit.media.edited import open_edited
from talkingdit.pipelines.inputs import Job, read_inputs
from talkingdit.pipelines.long_video import generate_clips

RATE = Fraction(30000, 1001)
FRAMES = 30
BOX = "30,30,66,60"  # where the mouth is said to be
INSIDE = np.s_[:, 30:60, 30:66]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_skyreels(tmp_path_factory.mktemp("skyreels"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    write_scene(root / "in.mp4", FRAMES)
    sound = np.random.default_rng(0).normal(0, 0.1, (16000, 2)).astype(np.float32)
    soundfile.write(root / "new.wav", sound, 16000)
    return root


def dub(folder: Path, files: Path, output: Path, *more: str) -> None:
    main(
        [
            *("generate", "--video", str(files / "in.mp4"), "--audio", str(files / "new.wav")),
            *("--checkpoint", str(folder), "--output", str(output), "--mask", BOX, "--windows", "2", *more),
        ]
    )


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def dubbed(folder: Path, files: Path) -> Path:
    dub(folder, files, files / "dubbed.mp4")
    return files / "dubbed.mp4"


def test_a_dubbed_video_keeps_its_rate_length_and_size_and_has_the_new_sound_as_it_is(dubbed: Path) -> None:
    with av.open(str(dubbed)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert video.average_rate == RATE
        assert (video.height, video.width) == (64, 96)
        assert sound.codec_context.layout.nb_channels == 2
    assert len(pictures(dubbed)) == FRAMES


def test_outside_of_the_mask_it_is_the_video_but_for_what_the_encoder_loses(dubbed: Path, files: Path) -> None:
    before, after = pictures(files / "in.mp4").astype(float), pictures(dubbed).astype(float)
    changed = np.zeros(before.shape, bool)
    changed[INSIDE] = True
    error = np.square(before - after)
    assert 10 * np.log10(255**2 / error[~changed].mean()) >= 40
    assert error[changed].mean() > 50 * error[~changed].mean()  # a random model makes something else


def test_what_is_composed_is_the_video_outside_of_the_mask_to_the_last_bit(folder: Path, files: Path) -> None:
    pipeline, conditions, _ = opened(folder, files)
    first = pipeline.clip(conditions, 0)
    second = pipeline.clip(conditions, 1, first.carry, last=True)
    made = torch.cat([first.frames, second.frames], 2)[0].permute(1, 2, 3, 0).numpy()
    source = np.stack(list(open_edited(files / "in.mp4").read()))
    assert made.shape == source.shape == (FRAMES, 64, 96, 3)
    changed = np.zeros(made.shape, bool)
    changed[INSIDE] = True
    np.testing.assert_array_equal(made[~changed], source[~changed])
    np.testing.assert_array_equal(made[0], source[0])  # the reference
    again = pipeline.clip(conditions, 1, first.carry, last=True)
    assert torch.equal(again.frames, second.frames)


def opened(folder: Path, files: Path, **options):
    from talkingdit.families.skyreels_audio.pipeline import open_pipeline
    from talkingdit.models import load_checkpoint

    job = Job(image=files / "in.mp4", audio=files / "new.wav", output=files / "out.mp4")
    given = Options(video=files / "in.mp4", mask=BOX, **{"windows": 2, **options})
    inputs = read_inputs(job, given.files())
    checkpoint = load_checkpoint(folder)
    found = outline(inputs, checkpoint.settings, given)
    pipeline = open_pipeline(checkpoint)
    return pipeline, pipeline.encode(inputs, found), found


def test_the_mouth_is_grey_and_the_mask_covers_all_that_it_touches(files: Path) -> None:
    class Edited:
        video = open_edited(files / "in.mp4")

    from talkingdit.families.skyreels_audio.outline import Edit
    from talkingdit.media.compose import crop_around
    from talkingdit.media.mouths import given_region

    region = given_region(BOX, Edited.video)
    edit = Edit(Edited.video, region, crop_around(region.bounds, (64, 96), 64 * 96, 16))
    pixels, made = masked_clip(edit, 0, 4)
    assert pixels.shape == (1, 3, 13, 64, 96)
    assert made.shape == (4, 8, 12)
    assert not made[0].any()  # the first frame is given whole
    assert not pixels[0, :, 1:, 24:64, 24:72].any()  # whole cells
    assert pixels[0, :, 1:, :24].all(0).any()
    np.testing.assert_array_equal(((pixels[0, :, 0] + 1) * 127.5).round().permute(1, 2, 0), next(Edited.video.read()))
    wanted = np.zeros((8, 12))
    wanted[3:8, 3:9] = 1
    np.testing.assert_array_equal(made[2], wanted)
    later, cells = masked_clip(edit, 6, 8)
    assert len(cells) == 2
    assert later.shape[2] == 1 + 4 * 7  # from the beginning on, which is near
    over, _ = masked_clip(edit, 8, 12)  # behind the end the last frame goes on
    assert torch.equal(over[:, :, -1], over[:, :, -5])


def test_hybrid_inference_sees_the_video_in_the_first_steps_alone(folder: Path, files: Path) -> None:
    frames = {}
    for steps in (0, 1, 2):
        pipeline, conditions, _ = opened(folder, files, video_steps=steps)
        frames[steps] = pipeline.clip(conditions, 0).frames
    full = opened(folder, files)
    assert torch.equal(full[0].clip(full[1], 0).frames, frames[2])  # of two steps
    assert not torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[1], frames[2])


def test_rescaled_guidance_gives_back_the_spread_of_the_conditioned_velocity(
    folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talkingdit.families.skyreels_audio.pipeline import SkyReelsAudioPipeline

    predict, said = SkyReelsAudioPipeline._predict, []

    def watched(self, clip, window, frames, step):
        predictions = predict(self, clip, window, frames, step)
        said.append((window.double(), [p.double() for p in predictions]))
        return predictions

    def done(step, timestep, latents):
        said.append(latents[0].double())
        return latents

    monkeypatch.setattr(SkyReelsAudioPipeline, "_predict", watched)
    found, phi = {}, 0.7
    for rescale in (0.0, phi):
        pipeline, conditions, _ = opened(
            folder, files, windows=1, steps=1, guidance="3", audio_guidance="4", rescale_guidance=rescale
        )
        said.clear()
        pipeline.clip(conditions, 0, progress=done)
        (x, (given, text, none)), found[rescale] = said
        velocity = 4 * given + (3 - 4) * text + (1 - 3) * none
        factor = rescale * given.std() / velocity.std() + 1 - rescale
        assert abs(rescale * (factor - 1)) >= 0.01 * rescale  # there is something to see
        wanted = x - factor * velocity  # from noise 1 to 0; the first latent is given
        torch.testing.assert_close(found[rescale][:, 1:], wanted[:, 1:], rtol=1e-5, atol=1e-5)
    assert (found[phi] - found[0.0])[:, 1:].abs().max() > 1e-3


@pytest.mark.parametrize("fusion", ["both", "one", "none"])
def test_every_fusion_makes_the_frames_of_all_windows(folder: Path, files: Path, fusion: str) -> None:
    pipeline, conditions, found = opened(
        folder, files, fusion=fusion, windows=3, overlap=2, audio_guidance="linear:3:1"
    )
    clips = list(generate_clips(pipeline, conditions, found.clips))
    assert len(clips) == 3
    assert sum(clip.frames.shape[2] for clip in clips) == FRAMES


def test_a_portrait_speaks(folder: Path, files: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(scene(1)[0]).save(tmp_path / "a.png")
    main(
        [
            *("generate", "--image", str(tmp_path / "a.png"), "--audio", str(files / "new.wav")),
            *("--checkpoint", str(folder), "--output", str(tmp_path / "out.mp4"), "--prompt", "a person talks"),
            *("--guidance", "2", "--printed-guidance", "--windows", "1", "--match-colour"),
            *("--rescale-guidance", "0.5"),
        ]
    )
    frames = pictures(tmp_path / "out.mp4")
    assert len(frames) == 25
    assert families.of_folder(folder).name == "skyreels_audio"


def test_colours_of_a_portrait_are_unified_without_a_step_between_clips_and_over_an_interrupt(
    folder: Path, files: Path, tmp_path: Path
) -> None:
    from PIL import Image

    from talkingdit.families.skyreels_audio.pipeline import open_pipeline
    from talkingdit.models import load_checkpoint

    Image.fromarray(scene(1)[0]).save(tmp_path / "a.png")
    pipeline = open_pipeline(load_checkpoint(folder))

    def clips(match: bool):
        job = Job(image=tmp_path / "a.png", audio=files / "new.wav", output=tmp_path / "out.mp4")
        given = Options(match_colour=match, windows=1)
        inputs = read_inputs(job, given.files())
        found = outline(inputs, pipeline.settings, given)
        conditions = pipeline.encode(inputs, found)
        made = list(generate_clips(pipeline, conditions, found.clips))
        again = pipeline.clip(conditions, 2, made[1].carry)  # as after an interrupt
        return [clip.frames for clip in made], again.frames

    plain, _ = clips(match=False)
    found, again = clips(match=True)
    unify = ColourUnifier()
    for one, other in zip(found, map(unify, plain), strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(found[1], plain[1], atol=1e-2)
    assert torch.equal(again, found[2])


def test_an_interrupted_run_goes_on_to_the_same_video(
    folder: Path, files: Path, dubbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talkingdit.families.skyreels_audio.pipeline import SkyReelsAudioPipeline

    whole, asked = SkyReelsAudioPipeline.clip, []

    def clip(self, conditions, index, *args, **more):
        asked.append(index)
        if asked == [0, 1]:
            raise KeyboardInterrupt
        return whole(self, conditions, index, *args, **more)

    monkeypatch.setattr(SkyReelsAudioPipeline, "clip", clip)
    output = tmp_path / "out.mp4"
    dub(folder, files, output)
    assert not output.exists()
    dub(folder, files, output)
    assert asked == [0, 1, 1]
    assert output.read_bytes() == dubbed.read_bytes()


def make_on(folder: Path, files: Path, layouts: tuple[str, ...]) -> list[np.ndarray]:
    """Frames of a dubbed video as a process of a team makes them, for each layout."""
    from talkingdit.distributed.layout import Layout
    from talkingdit.distributed.team import Team
    from talkingdit.families.skyreels_audio.pipeline import SkyReelsAudioPipeline
    from talkingdit.pipelines.parallel import share_work

    team, found = Team.start(), []
    pipeline, _, outlined = opened(folder, files, guidance="2")
    for words in layouts:
        shared = SkyReelsAudioPipeline(
            pipeline.checkpoint, share_work(team, Layout.parse(words), outlined.predictions, pipeline.checkpoint)
        )
        job = Job(image=files / "in.mp4", audio=files / "new.wav", output=files / f"{team.rank}.mp4")
        conditions = shared.encode(read_inputs(job, {"video": files / "in.mp4"}), outlined)
        clips = list(generate_clips(shared, conditions, outlined.clips))
        found.append(np.stack([clip.carry["latents"].numpy() for clip in clips[:-1]]))
    return found


@pytest.mark.slow
def test_several_processes_make_the_video_of_one(folder: Path, files: Path, processes) -> None:
    [alone] = make_on(folder, files, ("",))
    for made in processes(2, make_on, folder, files, ("ulysses=2,vae=one", "guidance=2,vae=one"), timeout=400):
        for latents in made:
            np.testing.assert_allclose(latents, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mask", "0,0,999,9"], "inside of the 96 x 64"),
        (["--overlap", "3"], "overlap must be 1 to 2"),
        (["--guidance", "much"], "--guidance must be a number"),
        (["--video-steps", "-1"], "--video-steps must be at least 0"),
        (["--rescale-guidance", "1.5"], "--rescale-guidance must be 0 to 1, got 1.5"),
        (["--rescale-guidance", "nan"], "--rescale-guidance must be 0 to 1, got nan"),
    ],
)
def test_what_cannot_be_is_told_before_models_are_loaded(
    folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    dub(folder, files, tmp_path / "out.mp4", *more)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()
