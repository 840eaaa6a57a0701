# SPDX-License-Identifier: Apache-2.0
"""LoRA files of every usual format: the same effect as adapters and merged, and no trace after they are gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official import random_transformer
from safetensors.torch import save_file
from torch import Tensor

from talkingdit.checkpoints.lora import Loras
from talkingdit.checkpoints.names import to_diffusers
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.load import load
from talkingdit.families.wan_s2v.save import save_official
from talkingdit.models import WanS2VModel

SIZE: dict[str, Any] = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 24, "text_len": 10},
    **{"audio_dim": 8, "audio_layers": 5, "audio_inject_layers": (0,)},
}
MODULES = ("blocks.0.self_attn.q", "blocks.1.cross_attn.v", "blocks.1.ffn.2", "time_projection.1", "head.head")
RANK, ALPHA = 4, 2.0


@pytest.fixture
def model() -> WanS2VModel:
    torch.manual_seed(0)
    return random_transformer(**SIZE)


@pytest.fixture(scope="module")
def matrices() -> dict[str, tuple[Tensor, Tensor]]:
    """down and up of every module."""
    torch.manual_seed(1)
    shapes = {name: value.shape for name, value in random_transformer(**SIZE).state_dict().items()}
    return {
        module: (
            0.3 * torch.randn(RANK, shapes[f"{module}.weight"][1]),
            torch.randn(shapes[f"{module}.weight"][0], RANK),
        )
        for module in MODULES
    }


def answer(model: WanS2VModel) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, text, audio = (torch.randn(s, generator=generator) for s in ((1, 16, 2, 4, 4), (1, 6, 24), (1, 5, 8, 8)))
    with torch.no_grad():
        inputs = WanInputs(text, audio=audio, reference=latents[:, :, :1])
        return model(latents, torch.tensor([300.0]), inputs)


def snapshot(model: WanS2VModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: WanS2VModel, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def with_changes(model: WanS2VModel, changes: dict[str, Tensor]) -> WanS2VModel:
    """A model of the changed weights, made by hand."""
    other = WanS2VModel(**{k: v for k, v in model.config.items() if k[0] != "_"}).eval()
    other.load_state_dict({k: v + changes[k] if k in changes else v for k, v in model.state_dict().items()})
    return other


Writer = Callable[[dict[str, tuple[Tensor, Tensor]]], dict[str, Tensor]]


def peft(prefix: str, rename: Callable[[str], str] = str, default: str = "") -> Writer:
    return lambda matrices: {
        f"{prefix}{rename(module)}.lora_{letter}{default}.weight": value
        for module, pair in matrices.items()
        for letter, value in zip("AB", pair, strict=True)
    }


def kohya(prefix: str, separator: str = ".", rename: Callable[[str], str] = str) -> Writer:
    def write(matrices: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        state = {}
        for module, (down, up) in matrices.items():
            name = prefix + rename(module).replace(".", separator)
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            state[f"{name}.alpha"] = torch.tensor(ALPHA)
        return state

    return write


FORMATS: dict[str, tuple[Writer, float]] = {
    "peft": (peft("base_model.model."), 1.0),
    "peft of a trainer": (peft("base_model.model.", default=".default"), 1.0),
    "native with lora_A": (peft("diffusion_model."), 1.0),
    "diffusers": (peft("transformer.", rename=to_diffusers), 1.0),
    "native with alpha": (kohya("diffusion_model."), ALPHA / RANK),
    "kohya": (kohya("lora_unet_", separator="_"), ALPHA / RANK),
    "kohya with diffusers names": (kohya("lora_unet_", separator="_", rename=to_diffusers), ALPHA / RANK),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_same_effect_and_leaves_no_trace(
    model: WanS2VModel, matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, name: str
) -> None:
    write, scale = FORMATS[name]
    save_file({key: value.contiguous() for key, value in write(matrices).items()}, tmp_path / "style.v1.safetensors")
    changes = {f"{module}.weight": 0.7 * scale * up @ down for module, (down, up) in matrices.items()}
    before, plain, wanted = snapshot(model), answer(model), answer(with_changes(model, changes))
    assert (wanted - plain).abs().max() > 1e-2

    loras = Loras(model)
    report = loras.load(tmp_path / "style.v1.safetensors", strength=0.7)
    assert (report.name, report.adapted, report.changed) == ("style_v1", len(MODULES), 0)
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-4)
    loras.merge()
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-4)
    loras.unmerge()
    torch.testing.assert_close(answer(model), wanted, rtol=1e-4, atol=1e-4)
    loras.unload()
    assert unchanged(model, before)
    assert torch.equal(answer(model), plain)


def test_differences_of_norms_biases_and_convolutions(model: WanS2VModel, tmp_path: Path) -> None:
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    wanted = {
        name: 0.1 * torch.randn(shapes[name])
        for name in ("blocks.0.norm3.weight", "blocks.0.self_attn.o.bias", "patch_embedding.weight", "head.head.weight")
    } | {"blocks.1.modulation": 0.1 * torch.randn(shapes["blocks.1.modulation"])}
    kinds = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    state = {}
    for name, value in wanted.items():
        module, _, leaf = name.rpartition(".")
        state[f"diffusion_model.{module}.{kinds[leaf]}"] = value
    down, up = 0.1 * torch.randn(2, 16, 1, 2, 2), torch.randn(32, 2, 1, 1, 1)
    state |= {"frame_packer.proj.lora_down.weight": down, "frame_packer.proj.lora_up.weight": up}
    wanted["frame_packer.proj.weight"] = torch.einsum("or,rcthw->octhw", up[..., 0, 0, 0], down)
    save_file(state, tmp_path / "distilled.safetensors")
    before, changed = snapshot(model), with_changes(model, wanted)
    loras = Loras(model)
    report = loras.load(tmp_path / "distilled.safetensors")
    assert (report.adapted, report.changed) == (0, 6)
    for merged in (False, True):
        torch.testing.assert_close(answer(model), answer(changed), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.frame_packer.proj.weight, changed.frame_packer.proj.weight)
        if not merged:
            loras.merge()
    loras.unload("distilled")
    assert unchanged(model, before)


def test_several_files_in_half_precision_leave_in_any_order(
    model: WanS2VModel, matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    model = model.to(torch.bfloat16)
    before = snapshot(model)
    loras = Loras(model)
    for name, factor in (("a", 1.0), ("b", -0.5)):
        save_file({k: factor * v for k, v in peft("")(matrices).items()}, tmp_path / f"{name}.safetensors")
        loras.load(tmp_path / f"{name}.safetensors", strength=0.5)
    assert loras.strengths == {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="there is a LoRA 'a' already"):
        loras.load(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="there is no LoRA 'c', only a, b"):
        loras.set_strength("c", 1.0)
    loras.merge()
    loras.set_strength("a", 2.0)
    down, up = matrices["blocks.0.self_attn.q"]
    wanted = before["blocks.0.self_attn.q.weight"].float() + (2.0 + 0.5 * 0.25) * up @ down
    found = model.get_parameter("blocks.0.self_attn.q.weight").float()
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    loras.unload("a")
    assert not unchanged(model, before)
    loras.unmerge()
    loras.unload("b")
    assert unchanged(model, before)


def test_without_originals_a_merge_is_final(
    model: WanS2VModel, matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    save_file(peft("")(matrices), tmp_path / "a.safetensors")
    loras = Loras(model)
    loras.load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the model has adapters; merge or unload them before it is saved"):
        save_official(tmp_path / "saved", model)
    loras.merge(keep_originals=False)
    with pytest.raises(UserError, match="merged without keeping the original weights; load the model again"):
        loras.unload()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(answer(load(tmp_path / "saved")), answer(model))


def test_the_alpha_of_a_configuration_counts(
    model: WanS2VModel, matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    config = {"lora_alpha": 8, "r": RANK, "alpha_pattern": {"ffn.2": 1}}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(peft("base_model.model.")(matrices), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loras = Loras(model)
    before = snapshot(model)
    loras.load(folder)
    loras.merge()
    for module, (down, up) in matrices.items():
        change = model.get_parameter(f"{module}.weight") - before[f"{module}.weight"]
        wanted = (0.25 if module.endswith("ffn.2") else 2.0) * up @ down
        torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-4)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="a DoRA adapter, which is not supported"):
        loras.load(folder, name="other")


def test_parts_for_an_image_branch_are_left_aside_and_said(
    model: WanS2VModel, matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    state = kohya("diffusion_model.")(matrices) | kohya("diffusion_model.")(
        {"blocks.0.cross_attn.k_img": matrices["blocks.1.cross_attn.v"]}
    )
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "i2v.safetensors")
    report = Loras(model).load(tmp_path / "i2v.safetensors")
    assert len(report.ignored) == 3
    assert "3 parts for an image branch left aside" in str(report)


def test_files_that_do_not_fit(model: WanS2VModel, matrices: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    down, up = matrices["blocks.0.self_attn.q"]
    before = snapshot(model)
    loras = Loras(model)
    layer = "blocks.0.ffn.0"
    for state, match in (
        (
            peft("")({"blocks.7.self_attn.q": (down, up)}),
            r"for layers that the model does not have: blocks\.7\.self_att",
        ),
        ({"blocks.0.self_attn.q.lora_down.weight": down}, "only one of the two matrices of blocks.0.self_attn.q"),
        (peft("")({layer: (down, up)}), r"\[4, 32\] and \[32, 4\], which does not fit its weight \[48, 32\]"),
        ({f"{layer}.lora_C": down}, r"not a LoRA file of a kind that is supported \(blocks\.0\.ffn\.0\.lora_C"),
        ({f"{layer}.diff_b": torch.zeros(3)}, r"changes blocks\.0\.ffn\.0\.bias by \[3\], which is \[48\]"),
        ({f"{layer}.alpha": torch.ones(())}, "holds nothing for this model"),
    ):
        save_file(state, file)
        with pytest.raises(UserError, match=match) as caught:
            loras.load(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no such LoRA file or folder"):
        loras.load(tmp_path / "nothing.safetensors")
    assert unchanged(model, before)
    assert loras.strengths == {}
