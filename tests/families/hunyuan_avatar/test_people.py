# SPDX-License-Identifier: Apache-2.0
"""The model of several drawn people that ships: found by name, small, and whole with a part of the other one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from talkingdit import families
from talkingdit.cli.main import main
from talkingdit.families.hunyuan_avatar.evaluate import generator, held_out_scene
from talkingdit.families.hunyuan_avatar.truth import Ask
from talkingdit.media.files import read_video
from talkingdit.models import find_checkpoint, load_checkpoint
from talkingdit.puppets import MODEL, PEOPLE, VOICE
from talkingdit.puppets.measure import HeldOutVoice, truth_of
from talkingdit.puppets.scenes import face_boxes, measure_mouths, portrait_of
from talkingdit.puppets.world import Scene

MEGABYTE = 1_000_000


def test_names_of_models_that_ship_stand_for_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But a folder that is called so is meant by its name."""
    assert find_checkpoint(None) == find_checkpoint("drawn") == MODEL
    assert find_checkpoint("drawn_people") == find_checkpoint(Path("drawn_people")) == PEOPLE
    assert find_checkpoint("nowhere") == Path("nowhere")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawn_people").mkdir()
    assert find_checkpoint("drawn_people") == Path("drawn_people")


def test_the_model_is_small_and_whole() -> None:
    assert sum(file.stat().st_size for file in PEOPLE.rglob("*") if file.is_file()) < 12 * MEGABYTE
    assert families.of_folder(PEOPLE).name == "hunyuan_avatar"
    checkpoint = load_checkpoint("drawn_people")
    assert checkpoint.settings.features == "speech"
    shipped = load_checkpoint()
    assert checkpoint.vae.state_dict().keys() == shipped.vae.state_dict().keys()


def test_every_mouth_follows_its_own_voice() -> None:
    """Not the other's, and not the sum of both: that is what the model is for. bench/results has it at length."""
    samples, rate = soundfile.read(VOICE, dtype="float32")
    voices = [samples[: 4 * rate], samples[6 * rate : 10 * rate]]
    frames = generator(load_checkpoint("drawn_people"))(Ask(held_out_scene(0, 0, 2), voices))
    truth = np.stack([truth_of(HeldOutVoice("", "", voice), len(frames), 16).opening for voice in voices])
    found = measure_mouths(frames, truth, 16)
    assert min(found["own"]) > 0.7
    assert max(found["others"]) < 0.4


def test_two_people_speak_with_a_voice_each(tmp_path: Path) -> None:
    """By the command line, as the README shows it."""
    scene = Scene.random(np.random.default_rng(3), "held_out", 2)
    picture = portrait_of(scene, 128)
    Image.fromarray(picture).save(tmp_path / "two.png")
    samples, rate = soundfile.read(VOICE, dtype="float32")
    words = []
    for number, (x0, y0, x1, y1) in enumerate(face_boxes(2)):
        soundfile.write(tmp_path / f"{number}.wav", samples[number * rate : (number + 1) * rate], rate)
        box = ",".join(f"{round(side * 128)}" for side in (x0, y0, x1, y1))
        words += ["--speaker", f"p{number}={tmp_path}/{number}.wav@{box}"]
    asked = ["--checkpoint", "drawn_people", "--image", str(tmp_path / "two.png"), *words, "--steps", "2"]
    assert main(["generate", *asked, "--prompt", "two people talking", "-o", str(tmp_path / "out.mp4")]) == 0
    frames, _, fps, _ = read_video(tmp_path / "out.mp4")
    assert (len(frames), fps) == (16, 16)
    assert np.abs(frames[0].astype(float) - picture).mean() < 60
