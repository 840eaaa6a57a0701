# SPDX-License-Identifier: Apache-2.0
"""The official autoencoder file through diffusers: the official numbers come out, and other files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from official import VAE_FILE, vae_state
from safetensors import safe_open
from torch import Tensor

from talkingdit.autoencoders.streaming import StreamingDecoder, encode
from talkingdit.autoencoders.wan import LATENTS_MEAN, LATENTS_STD, load_vae, vae_config, vae_name
from talkingdit.checkpoints.weights import TensorEntry, Weights
from talkingdit.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "wan_vae_t5.safetensors"


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()).item()


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        names = [key for key in file.keys() if key.startswith("vae/")]  # noqa: SIM118
        return json.loads(file.metadata()["spec"]), {key.removeprefix("vae/"): file.get_tensor(key) for key in names}


def test_the_official_numbers_come_out_of_the_official_file(
    golden: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    _, tensors = golden
    state = {k.removeprefix("state/"): v.float() for k, v in tensors.items() if k.startswith("state/")}
    torch.save(state, tmp_path / VAE_FILE)
    vae = load_vae(tmp_path / VAE_FILE)
    assert (vae.config.scale_factor_spatial, vae.config.scale_factor_temporal) == (8, 4)
    latents = encode(vae, tensors["in/video"])
    assert relative(latents, tensors["out/latent_normalised"]) < 1e-5
    # The official numbers are from before the final clamp.
    video = StreamingDecoder(vae)(tensors["in/latent_normalised"])
    assert relative(video, tensors["out/video"].clamp(-1, 1)) < 1e-5


def test_every_released_weight_has_a_place_of_its_shape(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    released = {name: tuple(shape) for name, shape in golden[0]["full_vae_keys"].items()}
    entries = {name: TensorEntry(Path(VAE_FILE), name, shape, torch.float32) for name, shape in released.items()}
    config = vae_config(Weights(Path(VAE_FILE), entries))
    with torch.device("meta"):
        found, default = AutoencoderKLWan(**config), AutoencoderKLWan()
    places = {name: tuple(value.shape) for name, value in found.state_dict().items()}
    assert {vae_name(name, config["num_res_blocks"]): shape for name, shape in released.items()} == places
    assert {k: v for k, v in found.config.items() if k[0] != "_"} == {
        k: v for k, v in default.config.items() if k[0] != "_"
    }
    assert (list(LATENTS_MEAN), list(LATENTS_STD)) == (default.config.latents_mean, default.config.latents_std)


def test_files_that_are_not_this_autoencoder(tmp_path: Path) -> None:
    file = tmp_path / VAE_FILE
    state = vae_state(z_dim=4)

    def refuse(match: str, **changes: Tensor | None) -> None:
        torch.save({k: v for k, v in (state | changes).items() if v is not None}, file)
        with pytest.raises(UserError, match=match) as caught:
            load_vae(file)
        assert "\n" not in str(caught.value)

    refuse(r"Wan2\.1_VAE\.pth: not the weights of a Wan 2\.1 autoencoder", **{"conv2.weight": None})
    refuse(r"lacks 1 of \d+ weights: decoder\.conv_in\.bias", **{"decoder.conv1.bias": None})
    refuse(r"has 1 of another shape: post_quant_conv\.bias \[5\] instead of \[4\]", **{"conv2.bias": torch.zeros(5)})
    refuse(r"has 1 that is not part of it: encoder\.extra\.weight", **{"encoder.extra.weight": torch.zeros(1)})
    refuse("is not part of it: encoder.down_blocks.2.attn", **{"encoder.downsamples.2.attn.weight": torch.zeros(1)})
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="must hold a dictionary of named tensors"):
        load_vae(file)
    file.write_bytes(b"PK not a real file")
    with pytest.raises(UserError, match="damaged or cut off"):
        load_vae(file)
    with pytest.raises(UserError, match="no such file"):
        load_vae(tmp_path / "nothing.pth")


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"conv2.weight": Evil()}, tmp_path / VAE_FILE)
    with pytest.raises(UserError, match="damaged or cut off"):
        load_vae(tmp_path / VAE_FILE)
    assert not (tmp_path / "ran").exists()
