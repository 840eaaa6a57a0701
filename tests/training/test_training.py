# SPDX-License-Identifier: Apache-2.0
"""A run from voices to an exported model, small enough for a test: it learns, it resumes exactly, its data are true."""

import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from training import state_file
from training.config import Config
from training.dataset import PuppetClips
from training.loop import Trainer
from training.puppets import precompute
from training.vae import Config as VaeConfig
from training.vae import make_vae


def speech_like(seconds, seed):
    """Syllables of a buzzing voice with pauses, 16 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(16000 * seconds)) / 16000
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 25))
    knots = rng.random(int(seconds * 5) + 2) * (rng.random(int(seconds * 5) + 2) > 0.25)
    return (0.1 * buzz * np.interp(t * 5, np.arange(len(knots)), knots)).astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Voices, an untrained autoencoder and the configuration of a tiny run."""
    root = tmp_path_factory.mktemp("world")
    rows = []
    for i, split in enumerate(("train", "train", "held_out")):
        soundfile.write(root / f"{i}.flac", speech_like(12, i), 16000)
        rows.append({"path": f"{i}.flac", "speaker": f"s{i}", "split": split})
    (root / "index.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    torch.manual_seed(0)
    make_vae(VaeConfig(base_dim=4, dim_mult=(1, 1, 1))).save_pretrained(root / "vae")
    config = Config()
    config.data.voices, config.data.vae, config.data.cache = root, root / "vae", root / "cache"
    config.data.long_videos, config.data.short_videos = 2, 3
    config.run.steps, config.checkpoint.every, config.sample.every = 4, 2, 1000
    config.batch.count, config.batch.size, config.optim.warmup_steps, config.parallel.precision = 1, 2, 1, "fp32"
    config.objective.regions = {"mouth": 8.0}
    config.sample.clips, config.sample.seconds, config.sample.steps = 1, 2.0, 1
    precompute(config.data, config.run.seed)
    return root, config


def run(config, out):
    config.run.out = out
    Trainer(config).run()
    return load_file(out / "model" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_weights(world, tmp_path, monkeypatch):
    _, config = world
    straight = run(config, tmp_path / "straight")

    original = Trainer.save

    def save_then_die(self):
        original(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "killed")
    monkeypatch.setattr(Trainer, "save", original)
    assert Trainer(config).step == 2
    resumed = run(config, tmp_path / "killed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert json.loads((tmp_path / "killed" / "config.json").read_text())["batch"]["size"] == 2


@pytest.mark.slow
def test_training_lowers_the_loss_on_the_same_clips(world, tmp_path):
    _, config = world
    config.run.out = tmp_path
    trainer = Trainer(config)
    before = _loss(trainer)
    config.run.steps = 10_000
    for _ in range(25):
        trainer.train_step()
    config.run.steps = 4
    assert _loss(trainer) < 0.8 * before


def _loss(trainer):
    trainer.rng = np.random.default_rng(5)
    torch.manual_seed(5)
    with torch.no_grad():
        return float(
            np.mean([trainer.loss(trainer.clips.batch(trainer.rng, 4, first))[0].mean() for first in (True, False)])
        )


def test_every_latent_of_a_clip_comes_with_its_own_audio_and_past(world):
    _, config = world
    clips = PuppetClips(config.data, config.model)
    rng = np.random.default_rng(0)
    first, later = clips.batch(rng, 6, True), clips.batch(rng, 6, False)
    assert first["history"] is None
    assert first["audio_history"] is None
    videos = [v for v in clips.videos]
    for i in range(6):
        video, start = _find(videos, later["latents"][i])
        at = 4 * (start - 1)
        torch.testing.assert_close(later["audio"][i], video["audio"][..., at : at + 32].float())
        torch.testing.assert_close(later["audio_history"][i], video["audio"][..., at - 8 : at].float())
        torch.testing.assert_close(later["history"][i, :, -1], video["latents"][:, start - 1].float())
        torch.testing.assert_close(later["reference"][i, :, 0], video["latents"][:, 0].float())
        assert later["captions"][i] == video["caption"]
        video, start = _find(videos, first["latents"][i])
        assert start == 1


def _find(videos, clip):
    for video in videos:
        latents = video["latents"].float()
        for start in range(latents.shape[1] - clip.shape[1] + 1):
            if torch.equal(latents[:, start : start + clip.shape[1]], clip):
                return video, start
    raise AssertionError("the clip is in no video")


def test_a_broken_checkpoint_gets_one_sentence(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        state_file.load(tmp_path / "checkpoint.pt")


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    state_file.save(file, {"step": 1})

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(state_file.os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        state_file.save(file, {"step": 2})
    assert state_file.load(file)["step"] == 1
