# SPDX-License-Identifier: Apache-2.0
"""The model in the package has learned to speak: what a user's first video looks like, measured."""

from pathlib import Path

import numpy as np
import pytest

import talkingdit
from talkingdit.encoders.log_mel import SpeechFeatures, normalise_loudness
from talkingdit.media.files import SPEECH_RATE, read_audio
from talkingdit.puppets.probe import measure_logo, probe
from talkingdit.puppets.render import render
from talkingdit.puppets.visemes import visemes_from_audio
from talkingdit.puppets.world import Motion, Scene

ASSETS = Path(talkingdit.__file__).parent / "puppets" / "assets"


@pytest.fixture(scope="module")
def spoken():
    """A held-out character speaks the shipped clip, a voice and a language that training never heard."""
    from talkingdit.families.puppet.pipeline import PuppetPipeline
    from talkingdit.models import load_checkpoint

    checkpoint = load_checkpoint(ASSETS / "model")
    scene = Scene.random(np.random.default_rng(12), "held_out")
    shut = np.zeros((1, 1), np.float32)
    portrait = render(scene, shut, shut + 0.5, [Motion.still(1)], checkpoint.settings.size)[0]
    waveform = normalise_loudness(read_audio(ASSETS / "voice.flac", SPEECH_RATE))
    truth = visemes_from_audio(waveform, 16).opening
    features = SpeechFeatures(16)(waveform, len(truth))
    frames = np.concatenate(list(PuppetPipeline(checkpoint).generate(portrait, features, scene.caption())))
    return scene, truth, frames


@pytest.mark.slow
def test_the_mouth_follows_a_voice_it_has_never_heard(spoken):
    _, truth, frames = spoken
    measured = probe(frames).opening[0]
    lags = {lag: np.corrcoef(truth[4:-4], np.roll(measured, -lag)[4:-4])[0, 1] for lag in range(-4, 5)}
    assert lags[0] > 0.9
    assert max(lags, key=lags.get) == 0
    assert 0.8 < np.polyfit(truth, measured, 1)[0] < 1.2
    assert abs(np.corrcoef(np.roll(truth, len(truth) // 2), measured)[0, 1]) < 0.35


@pytest.mark.slow
def test_the_person_of_the_portrait_stays_to_the_end(spoken):
    scene, _, frames = spoken
    assert probe(frames).identity_share(0, scene.characters[0]) >= 0.95


@pytest.mark.slow
def test_the_logo_of_the_portrait_stays_to_the_end(spoken):
    scene, _, frames = spoken
    worn = scene.characters[0].logo, scene.characters[0].logo_colour
    assert np.mean([found == worn for found in measure_logo(frames)]) >= 0.95
