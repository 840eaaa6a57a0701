# SPDX-License-Identifier: Apache-2.0
"""GGUF files of a Wan-S2V transformer: the weights that the format's own package reads, in the model that answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official import make_official, random_transformer
from torch import Tensor

from talkingdit.checkpoints.lora import Loras
from talkingdit.checkpoints.weights import open_weights
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.checkpoint import load_checkpoint
from talkingdit.families.wan_s2v.load import load
from talkingdit.models import WanS2VModel

gguf = pytest.importorskip("gguf", reason="gguf is an optional extra")
SIZE: dict[str, Any] = {
    **{"dim": 256, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "freq_dim": 32, "text_dim": 32, "text_len": 10},
    **{"audio_dim": 32, "audio_layers": 5, "audio_inject_layers": (0,)},
}
SAID = {"config": {"audio_inject_layers": (0,), "text_len": 10}}
# How far a weight is from the one that was quantised, relative to its norm.
KINDS = {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q5_1": 0.06, "Q5_0": 0.06, "Q4_1": 0.12, "Q4_0": 0.12}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return random_transformer(**SIZE).state_dict()


def write(path: Path, state: dict[str, Tensor], kind: str, prefix: str = "", flatten: bool = False) -> Path:
    """As ComfyUI-GGUF's converter does: large matrices quantised, the rest float32, five dimensions as they are."""
    writer = gguf.GGUFWriter(path, "wan")
    for name, value in state.items():
        data = value.numpy()
        chosen = kind if value.dim() == 2 and value.shape[1] % 32 == 0 and "modulation" not in name else "F32"
        quantised = gguf.GGMLQuantizationType[chosen]
        if flatten and value.dim() > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", [int(size) for size in data.shape])
            data = data.reshape(-1, data.shape[-1] * data.shape[-2])
        writer.add_tensor(prefix + name, gguf.quants.quantize(data, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def truth(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """What gguf itself makes of the values, flat."""
    return {
        tensor.name.removeprefix(prefix): torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        ).flatten()
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_package_of_the_format_reads(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / f"wan2.2_s2v_{kind}.gguf", state, kind)
    model = load(path, **SAID)
    wanted = truth(path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.flatten(), wanted[name], rtol=1e-6, atol=1e-7)
        assert value.shape == state[name].shape
        assert (value - state[name]).norm() <= KINDS[kind] * state[name].norm(), name
    assert not torch.equal(model.blocks[0].ffn[0].weight, state["blocks.0.ffn.0.weight"])
    half = load(path, torch.bfloat16, **SAID)
    assert half.blocks[0].ffn[0].weight.dtype == torch.bfloat16
    assert half.blocks[0].modulation.dtype == torch.float32


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "TQ1_0", "MXFP4"]
)
def test_blocks_of_every_kind_widen_as_the_package_does_it(kind: str, tmp_path: Path) -> None:
    """Also of kinds that the package cannot write: blocks of random bytes, with finite scales."""
    quantised = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantised]
    blocks = np.random.default_rng(0).integers(0, 60, (8, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "wan")
    writer.add_tensor("w", blocks, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = open_weights(tmp_path / "one.gguf")
    assert weights.shapes == {"w": (8, 512)}
    found = weights.read(["w"])["w"]
    torch.testing.assert_close(found.flatten(), truth(tmp_path / "one.gguf")["w"], rtol=1e-6, atol=1e-7)
    assert found.std() > 0


def test_prefixes_and_flattened_convolutions(state: dict[str, Tensor], tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    path = write(tmp_path / "a.gguf", state, "Q8_0", prefix, flatten=True)
    assert len(open_weights(path).shapes[f"{prefix}patch_embedding.weight"]) == 5
    model = load(path, **SAID)
    assert torch.equal(model.patch_embedding.weight, state["patch_embedding.weight"])


def test_a_checkpoint_whose_transformer_is_a_gguf_file(tmp_path: Path) -> None:
    folder = make_official(tmp_path / "Wan2.2-S2V-14B", vae_dim=4, dim=64, dtype=torch.float32)
    before = load_checkpoint(folder, torch.float32, "cpu").transformer
    for file in folder.glob("diffusion_pytorch_model*"):
        file.unlink()
    write(folder / "Wan2.2-S2V-14B-Q8_0.gguf", before.state_dict(), "Q8_0")
    after = load_checkpoint(folder, torch.float32, "cpu").transformer
    assert after.config == before.config
    for name, value in after.state_dict().items():
        assert (value - before.state_dict()[name]).norm() <= 0.01 * before.state_dict()[name].norm(), name
    write(folder / "Wan2.2-S2V-14B-Q4_0.gguf", before.state_dict(), "Q4_0")
    with pytest.raises(UserError, match=r"Q4_0.gguf, .*Q8_0.gguf could each be meant; leave one in the folder"):
        load_checkpoint(folder, torch.float32, "cpu")


def test_a_lora_goes_on_top(state: dict[str, Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model: WanS2VModel = load(write(tmp_path / "a.gguf", state, "Q8_0"), **SAID)
    before = model.blocks[0].self_attn.q.weight.double()
    down, up = torch.randn(4, 256), torch.randn(256, 4)
    save_file(
        {"blocks.0.self_attn.q.lora_A.weight": down, "blocks.0.self_attn.q.lora_B.weight": up},
        tmp_path / "l.safetensors",
    )
    loras = Loras(model)
    loras.load(tmp_path / "l.safetensors", strength=0.5)
    loras.merge()
    wanted = before + 0.5 * up.double() @ down.double()
    torch.testing.assert_close(model.blocks[0].self_attn.q.weight.double(), wanted, rtol=1e-5, atol=1e-5)


def test_without_the_package_the_file_is_named_and_what_to_install(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.gguf", state, "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"a\.gguf: a GGUF file of quantised weights; .* 'talkingdit\[gguf\]'"):
        load(path, **SAID)


def test_damaged_and_foreign_files(state: dict[str, Tensor], tmp_path: Path) -> None:
    whole = write(tmp_path / "a.gguf", state, "Q8_0").read_bytes()
    for name, data in (
        ("cut.gguf", whole[: len(whole) // 2]),
        ("short.gguf", whole[:30]),
        ("empty.gguf", b""),
        ("json.gguf", json.dumps({}).encode()),
        ("counts.gguf", whole[:8] + b"\xff" * 16 + whole[24:]),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: damaged or cut off") as caught:
            load(tmp_path / name, **SAID)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"llama\.gguf: no patch_embedding\.weight in it"):
        load(write(tmp_path / "llama.gguf", {"token_embd.weight": torch.zeros(4, 32)}, "Q8_0"), **SAID)
