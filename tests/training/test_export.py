# SPDX-License-Identifier: Apache-2.0
"""What is written of trained networks does elsewhere what they did here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import TINY

from talkingdit.errors import UserError
from talkingdit.models import WanInputs, load_checkpoint
from training import export
from training.build import new_networks
from training.config import Config
from training.vae import VaeConfig, make_vae


def make_config(folder: Path, train: list[str]) -> Config:
    torch.manual_seed(0)
    make_vae(VaeConfig(base_dim=4, dim_mult=(1, 1, 1))).save_pretrained(folder / "vae")
    config = Config()
    config.data.vae = folder / "vae"
    config.data.size = 48
    config.model.settings = dict(TINY)
    config.lora.rank, config.lora.targets = 4, ["self_attn.q", "ffn.0"]
    config.stage_tables = [{"name": "adapt", "steps": 1, "train": train}]
    return config


@torch.no_grad()
def test_adapters_that_trained_beside_other_weights_are_merged_into_the_model(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["*lora_*", "casual_audio_encoder.*"])
    networks = new_networks(config).eval()
    for name, parameter in networks.named_parameters():
        if ".lora_" in name or name.endswith("head.head.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    inputs = torch.randn(1, 16, 2, 6, 6), torch.tensor([500.0]), WanInputs(torch.randn(1, 5, 64))
    expected = networks.transformer(*inputs)
    export.write({name: value.clone() for name, value in networks.state_dict().items()}, config, tmp_path)
    checkpoint = load_checkpoint(tmp_path, torch.float32, "cpu")
    error = checkpoint.transformer(*inputs) - expected
    networks.transformer.disable_lora()
    effect = networks.transformer(*inputs) - expected
    assert effect.std() > 0.1 * expected.std()
    assert error.std() < 0.1 * effect.std()  # bfloat16


def test_adapters_alone_are_one_file(tmp_path: Path) -> None:
    config = make_config(tmp_path, ["*lora_*"])
    export.write(new_networks(config).state_dict(), config, tmp_path)
    kinds = {
        name.rsplit(".", 2)[-2 if name.endswith("weight") else -1]
        for name in load_file(tmp_path / "adapter.safetensors")
    }
    assert kinds == {"lora_A", "lora_B", "alpha"}
    assert not (tmp_path / "transformer").exists()


def test_export_of_a_folder_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        export.main(export.ExportFlags(tmp_path, tmp_path / "model"))


def test_a_folder_of_something_else_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(UserError, match=r"thesis: expected a new folder or one with an earlier model, got .*chapter"):
        export.main(export.ExportFlags(tmp_path, tmp_path / "thesis"))
    with pytest.raises(UserError, match=r"chapter.tex: expected a new folder, got a file"):
        export.main(export.ExportFlags(tmp_path, tmp_path / "thesis" / "chapter.tex"))
