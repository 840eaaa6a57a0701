# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints: what was saved comes back, and whatever does not fit is said in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_checkpoint, make_transformer, make_vae

import talkingdit
from talkingdit.errors import UserError
from talkingdit.families.puppet.checkpoint import PuppetSettings
from talkingdit.families.wan_s2v.load import load
from talkingdit.models import load_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("saved"), seed=5)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_saved_comes_back(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    assert checkpoint.settings == PuppetSettings(
        size=32, clip_latents=2, steps=2, text_guidance=1.5, audio_guidance=2.0
    )
    for name in ("transformer", "vae", "text_encoder"):
        model = getattr(checkpoint, name)
        assert not model.training
        stored = load_file(saved / name / WEIGHTS)
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in stored.items()}
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, stored[key], rtol=0, atol=0)


def test_half_precision_files_load_as_float32(folder: Path) -> None:
    for name in ("transformer", "vae", "text_encoder"):
        path = folder / name / WEIGHTS
        halved = {key: value.to(torch.bfloat16) for key, value in load_file(path).items()}
        save_file(halved, path, metadata={"format": "pt"})
    checkpoint = load_checkpoint(folder)
    for name in ("transformer", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(checkpoint, name).parameters()} == {torch.float32}


def test_a_transformer_loads_from_its_folder_a_checkpoint_or_the_official_class_name(folder: Path) -> None:
    whole, part = talkingdit.models.load(folder), load(folder / "transformer")
    edit(folder / "transformer" / "config.json", _class_name="WanModel_S2V")
    for other in (part, load(folder / "transformer")):
        for a, b in zip(whole.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_preset_gives_the_same_random_weights_for_a_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    one, same, other = load("puppet_tiny", seed=1), load("puppet_tiny", seed=1), load("puppet_tiny", seed=2)
    torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)
    weights = [model.blocks[0].ffn[0].weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_preset_is_made_where_and_as_it_is_wanted() -> None:
    model = load("puppet_tiny", torch.bfloat16)
    for name, value in model.named_parameters():
        exact = any(part in name.split(".") for part in ("time_embedding", "time_projection", "modulation"))
        assert value.dtype == (torch.float32 if exact else torch.bfloat16), name
    assert torch.get_default_dtype() == torch.float32
    assert {value.device.type for value in load("wan_s2v_14b", torch.bfloat16, "meta").parameters()} == {"meta"}


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refuse(tmp_path / "nothing", "nothing: the checkpoint must be a folder, and there is none of this name")
    with pytest.raises(UserError, match=r"nothing: neither a folder nor a preset \(.*puppet_tiny, .*wan_s2v_14b\)"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_missing_part(folder: Path, part: str) -> None:
    (folder / part / WEIGHTS).unlink()
    refuse(folder, rf"{part}: no \*.safetensors in it; the checkpoint is not complete")
    (folder / part / "config.json").unlink()
    refuse(folder, r"config\.json: there is no such file; the checkpoint is not complete")
    shutil.rmtree(folder / part)
    refuse(folder, f"not a checkpoint, the folder {part}/ is missing in it")


def test_missing_or_broken_settings(folder: Path) -> None:
    file = folder / "pipeline.json"
    for change, match in (
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"size": 40}, "size must be a multiple of 16 pixels, got 40"),
        ({"shift": -1.0}, "shift must be a number of at least 0, got -1.0"),
        ({"features": "wav2vec2"}, "features must be one of speech, got 'wav2vec2'"),
        ({"speed": 3}, "unknown setting 'speed'; known are audio_guidance, audio_history, clip_latents"),
    ):
        before = file.read_text()
        edit(file, **change)
        refuse(folder, match)
        file.write_text(before)
    file.write_text("{")
    refuse(folder, r"pipeline\.json: not a readable JSON file")
    file.write_text("[1]")
    refuse(folder, r"pipeline\.json: must hold a JSON object, got list")
    file.unlink()
    refuse(folder, r"pipeline\.json: there is no such file")


def test_another_class(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    refuse(
        folder,
        "_class_name must be WanS2VModel or WanModel_S2V or WanS2VTransformer3DModel, got 'FluxTransformer2DModel'",
    )


def test_weights_that_do_not_fit_the_configuration(folder: Path) -> None:
    edit(folder / "transformer" / "config.json", ffn_dim=128)
    refuse(
        folder,
        r"does not fit WanS2VModel; it has 6 of another shape: blocks\.0\.ffn\.0\.weight \[64, 48\] instead",
    )


def test_weights_that_are_missing_or_left_over(folder: Path) -> None:
    path = folder / "transformer" / WEIGHTS
    weights = load_file(path)
    save_file(weights | {"extra.weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    refuse(folder, r"does not fit WanS2VModel; it has 1 that is not part of it: extra\.weight\.$")
    del weights["blocks.1.ffn.0.weight"], weights["head.head.bias"]
    save_file(weights, path, metadata={"format": "pt"})
    refuse(folder, r"it lacks 2 of \d+ weights: blocks\.1\.ffn\.0\.weight, head\.head\.bias\.$")


def test_a_damaged_weight_file(folder: Path) -> None:
    path = folder / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    refuse(folder, r"vae/diffusion_pytorch_model\.safetensors: damaged or cut off")


def test_parts_that_do_not_fit_each_other(folder: Path) -> None:
    make_vae(z_dim=8).save_pretrained(folder / "vae")
    refuse(folder, "the transformer has in_dim 16 but the vae has 8 latent channels")
    make_vae().save_pretrained(folder / "vae")
    make_transformer(text_dim=32).save_pretrained(folder / "transformer")
    refuse(folder, "the transformer has text_dim 32 but the text encoder 64")
