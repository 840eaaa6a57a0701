# SPDX-License-Identifier: Apache-2.0
"""What the measures of scenes are compared with: videos in which everybody does what was asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import soundfile

from talkingdit.families.hunyuan_avatar.evaluate import held_out_scene
from talkingdit.families.hunyuan_avatar.truth import Ask, true_generator, true_play
from talkingdit.media.files import SPEECH_RATE
from talkingdit.models import load_checkpoint
from talkingdit.puppets import VOICE
from talkingdit.puppets.scenes import measure_moods, measure_mouths

FPS = 16
VOICES = [part.copy() for part in np.split(soundfile.read(VOICE, dtype="float32")[0][: 8 * SPEECH_RATE], 2)]


def test_everybody_does_what_is_asked() -> None:
    """Own voices move mouths, turns and silence stop them, one voice without masks moves all, moods come on time."""
    scene = held_out_scene(0, 0, 2)
    play = true_play(Ask(scene, VOICES), FPS)
    assert play.openings.shape == (2, 61)
    assert play.openings.std(1).min() > 0.05
    assert abs(np.corrcoef(play.openings)[0, 1]) < 0.5
    silent = true_play(Ask(scene, [VOICES[0], None]), FPS)
    assert np.array_equal(silent.openings[0], play.openings[0])
    assert not silent.openings[1].any()
    turns = true_play(Ask(scene, [VOICES[0]], turns=[(0, 0.0, 2.0), (1, 2.0, 4.0)]), FPS)
    assert not turns.openings[0, 32:].any()
    assert not turns.openings[1, :32].any()
    assert np.array_equal(turns.openings.sum(0), play.openings[0])
    both = true_play(Ask(scene, [VOICES[0], None], masks=False), FPS)
    assert np.array_equal(both.openings, np.stack([play.openings[0]] * 2))
    told = Ask(scene, VOICES, moods=[("happy", 0.0, 1.0), ("angry", 1.0, 4.0)])
    assert list(true_play(told, FPS).moods or ()) == ["happy"] * 16 + ["angry"] * 45
    assert true_play(replace(told, mood_strength=0.0), FPS).moods is None


def test_measures_find_it_behind_the_autoencoder() -> None:
    """The mouths nearly as drawn; one that stands still seems to move, by what the autoencoder adds."""
    ask = Ask(held_out_scene(0, 0, 2), [VOICES[0], None])
    make = true_generator(load_checkpoint().vae, 128, FPS)
    found = measure_mouths(make(ask), true_play(ask, FPS).openings, FPS)
    assert found["own"][0] > 0.95
    assert 0.01 < found["silent"][0] < 0.2
    told = ["happy"] * 16 + ["surprised"] * 13
    moods = [("happy", 0.0, 1.0), ("surprised", 1.0, 2.0)]
    frames = make(Ask(held_out_scene(0, 0, 1), [VOICES[0][: 2 * SPEECH_RATE]], moods=moods))
    assert measure_moods(frames, told, 1, FPS)["follows"] > 0.7
