# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is loaded without diffusers makes the same video as one that is loaded with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from tiny_checkpoint import make_checkpoint

from talkingdit.errors import UserError
from talkingdit.families.puppet.checkpoint import PuppetCheckpoint, load_bare, load_checkpoint
from talkingdit.families.puppet.pipeline import PuppetPipeline, schedule
from talkingdit.families.wan_s2v.model import WanS2VModel
from talkingdit.nn.configured import BareModel, FrozenConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bare") / "model")


def video(checkpoint: PuppetCheckpoint) -> np.ndarray:
    portrait = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    config = checkpoint.transformer.config
    voice = torch.randn(config.audio_layers, config.audio_dim, 12, generator=torch.Generator().manual_seed(1))
    return np.concatenate(list(PuppetPipeline(checkpoint).generate(portrait, voice, "a happy person")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_video(folder: Path, dtype: torch.dtype) -> None:
    bare, full = load_bare(folder, dtype, "cpu"), load_checkpoint(folder, dtype, "cpu")
    for part in ("transformer", "vae", "text_encoder"):
        mine, theirs = getattr(bare, part), getattr(full, part)
        assert isinstance(mine, BareModel)
        assert (mine.dtype, mine.device) == (theirs.dtype, theirs.device)
        assert {k: v for k, v in theirs.config.items() if not k.startswith("_")} == {
            k: list(v) if isinstance(theirs.config[k], list) else v for k, v in mine.config.items()
        }
        states = mine.state_dict(), theirs.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    want = video(full)
    assert len(want) == 12
    assert want.std() > 1
    if dtype == torch.float32:  # the autoencoders convolve in another order: a pixel may be rounded to its neighbour
        away = np.abs(video(bare).astype(int) - want.astype(int))
        assert away.max() <= 1
        assert away.mean() < 1e-3
    else:
        assert np.array_equal(video(bare), want)


def test_the_transformer_of_diffusers_is_one(folder: Path, tmp_path: Path) -> None:
    """Its configuration is kept, and what it saves loads, though its network is a class of its own."""
    model = load_checkpoint(folder, torch.float32, "cpu").transformer
    assert isinstance(model, WanS2VModel)
    model.save_pretrained(tmp_path / "saved")
    again = WanS2VModel.from_pretrained(tmp_path / "saved")
    known, found = ({k: str(v) for k, v in m.config.items() if k[0] != "_"} for m in (model, again))
    assert {k: v.replace("(", "[").replace(")", "]") for k, v in known.items()} == found
    assert again.config["dim"] == 48
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_settings_that_the_bare_autoencoder_lacks_load_with_diffusers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for part in folder.iterdir():
        (tmp_path / "model" / part.name).symlink_to(part)
    (tmp_path / "model" / "vae").unlink()
    (tmp_path / "model" / "vae").mkdir()
    values = json.loads((folder / "vae" / "config.json").read_text())
    (tmp_path / "model" / "vae" / "config.json").write_text(json.dumps(values | {"dropout": 0.5}))
    (weights,) = (folder / "vae").glob("*.safetensors")
    (tmp_path / "model" / "vae" / weights.name).symlink_to(weights)
    assert isinstance(load_bare(tmp_path / "model", torch.float32, "cpu").vae, AutoencoderKLWan)


def test_errors_are_the_same_sentences(folder: Path, tmp_path: Path) -> None:
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "transformer").unlink()
    (tmp_path / "transformer").mkdir()
    values = json.loads((folder / "transformer" / "config.json").read_text())
    (weights,) = (folder / "transformer").glob("*.safetensors")
    (tmp_path / "transformer" / weights.name).symlink_to(weights)
    for changed in ({"num_layers": 3}, {"dim": 50}, {"_class_name": "Other"}):
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(values | changed))
        sentences = []
        for load in (load_bare, load_checkpoint):
            with pytest.raises(UserError) as told:
                load(tmp_path, torch.float32, "cpu")
            sentences.append(str(told.value))
        assert sentences[0] == sentences[1]


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (8, 3.0), (50, 5.0), (7, 0.3)])
def test_noise_levels_are_those_of_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1].tolist())
    assert schedule(steps, shift) == scheduler.sigmas.tolist()


def test_a_configuration_cannot_be_changed() -> None:
    config = FrozenConfig(dim=3)
    assert config.dim == config["dim"] == 3
    for change in (lambda: config.update(dim=4), lambda: setattr(config, "dim", 4), lambda: config.pop("dim")):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    with pytest.raises(AttributeError, match="depth"):
        config.depth  # noqa: B018
