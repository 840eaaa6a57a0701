# SPDX-License-Identifier: Apache-2.0
"""The autoencoder's training: what mouths it sees, what its loss punishes, and that a run goes on where it stopped."""

import json

import numpy as np
import pytest
import soundfile
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from talkingdit.puppets.visemes import Visemes
from training import vae
from training.vae import Mouths, VaeConfig, reconstruction_loss


def test_half_of_the_mouths_are_stretches_of_recorded_voices():
    curve = np.linspace(0, 1, 50, dtype=np.float32)
    mouths = Mouths([Visemes(curve, 1 - curve), Visemes(curve[:5], curve[:5])])
    rng = np.random.default_rng(0)
    spoken = 0
    for _ in range(200):
        opening, width = mouths.draw(rng, 9)
        assert opening.shape == width.shape == (9,)
        at = np.flatnonzero(curve == opening[0])
        spoken += (
            bool(len(at)) and np.array_equal(opening, curve[at[0] : at[0] + 9]) and np.allclose(width, 1 - opening)
        )
    assert 70 < spoken < 130
    assert mouths.draw(rng, 60).shape == (2, 60)  # longer than any voice: random


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.5, 0.0)])
def test_the_loss_sees_a_tint_and_a_blur_beyond_their_pixel_error(weights):
    torch.manual_seed(0)
    target = torch.randn(1, 3, 5, 16, 16)
    weight = torch.ones(1, 1, 1, 16, 16)
    tint = torch.full_like(target, 0.1)
    noise = 0.1 * torch.sign(torch.randn_like(target))  # the same pixel error as the tint
    by_kind = [reconstruction_loss(target + error, target, weight, *weights).item() for error in (tint, noise)]
    pixels = 0.1
    if weights[1]:
        assert by_kind[0] == pytest.approx(2 * pixels, rel=1e-4)  # the tint is all mean
        assert by_kind[1] < 1.3 * pixels
    else:
        assert by_kind[0] == pytest.approx(pixels, rel=1e-4)  # a tint has no edges
        assert by_kind[1] > 1.5 * pixels


@pytest.mark.slow
def test_a_run_writes_a_normalised_autoencoder_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    voices = tmp_path / "voices"
    voices.mkdir()
    t = np.arange(16000 * 6) / 16000
    soundfile.write(voices / "a.flac", 0.2 * np.sin(900 * t) * np.abs(np.sin(9 * t)), 16000)
    (voices / "index.jsonl").write_text(json.dumps({"path": "a.flac", "speaker": "s", "split": "train"}))
    config = VaeConfig(out=tmp_path / "run", voices=voices, minutes=0.01, base_dim=4, dim_mult=(1, 1, 1), threads=1)
    monkeypatch.setattr(vae, "CROPPED_SHAPES", ((1, 5),))
    monkeypatch.setattr(vae, "latent_statistics", lambda *a, clips=24: STATISTICS(*a, clips=2))
    vae.main(config)
    first = torch.load(config.out / "state.pt", weights_only=True)
    made = AutoencoderKLWan.from_pretrained(config.out / "vae")
    assert all(std > 0 for std in made.config.latents_std)
    config.minutes = first["elapsed"] / 60 + 0.01
    vae.main(config)
    assert torch.load(config.out / "state.pt", weights_only=True)["step"] > first["step"] > 0


STATISTICS = vae.latent_statistics
