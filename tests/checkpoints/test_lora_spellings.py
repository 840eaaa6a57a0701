# SPDX-License-Identifier: Apache-2.0
"""LoRA files as every trainer writes them: the merged weight is weight + strength * change, in float64, row by row.

The rows are those of the table in docs/lora.md, which says where each spelling is written. Nothing here uses the code
that reads files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from official import random_transformer
from safetensors.torch import save_file
from torch import Tensor

from talkingdit.checkpoints.lora import Loras
from talkingdit.models import WanS2VModel

ROOT = Path(__file__).parents[2]
SIZE: dict[str, Any] = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 24, "text_len": 10},
    **{"audio_dim": 8, "audio_layers": 5, "audio_inject_layers": (0,)},
}
# Native and diffusers name of the layers of a file.
LAYERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
    "audio_injector.injector.0.k": "audio_injector.injector.0.to_k",
}
RANK, ALPHA, STRENGTH = 4, 2.0, 0.7

Factors = dict[str, Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


def low_rank(rows: int, columns: int) -> tuple[Factors, Tensor]:
    down, up = 0.3 * draw(RANK, columns), draw(rows, RANK)
    return {"down": down, "up": up}, up.double() @ down.double()


def hadamard(rows: int, columns: int) -> tuple[Factors, Tensor]:
    a1, a2, b1, b2 = draw(rows, RANK), draw(rows, RANK), 0.3 * draw(RANK, columns), 0.3 * draw(RANK, columns)
    product = (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, product


def kronecker(rows: int, columns: int) -> tuple[Factors, Tensor]:
    """A whole first factor and a second one of low rank, 4 x 8 and the rest."""
    w1, a, b = draw(4, 8), 0.3 * draw(rows // 4, RANK), draw(RANK, columns // 8)
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}, torch.kron(w1.double(), a.double() @ b.double())


def kronecker_whole(rows: int, columns: int) -> tuple[Factors, Tensor]:
    w1, w2 = draw(4, 8), 0.3 * draw(rows // 4, columns // 8)
    return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1.double(), w2.double())


def whole(rows: int, columns: int) -> tuple[Factors, Tensor]:
    value = 0.1 * draw(rows, columns)
    return {"diff": value}, value.double()


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}


def adapter(name: str) -> dict[str, str]:
    return {"down": f"lora_A.{name}.weight", "up": f"lora_B.{name}.weight"}


@dataclass(frozen=True)
class Row:
    """How a trainer writes a file."""

    place: Callable[[str, str], str]  # native and diffusers name -> that of the file
    ends: dict[str, str] = field(default_factory=lambda: PEFT)
    alpha: bool = False  # a tensor of its own for each layer
    scale: float | Callable[[Factors], float] = 1.0
    make: Callable[[int, int], tuple[Factors, Tensor]] = low_rank
    config: dict[str, Any] | None = None  # adapter_config.json beside the file
    metadata: dict[str, str] | None = None
    more: dict[str, Tensor] = field(default_factory=dict)


def native(prefix: str) -> Callable[[str, str], str]:
    return lambda name, other: prefix + name


def diffusers(prefix: str) -> Callable[[str, str], str]:
    return lambda name, other: prefix + other


def flat(prefix: str) -> Callable[[str, str], str]:
    return lambda name, other: prefix + name.replace(".", "_")


def flat_diffusers(prefix: str) -> Callable[[str, str], str]:
    return lambda name, other: prefix + other.replace(".", "_")


def dotted_tail(name: str, other: str) -> str:
    """The first dot becomes an underscore and the others stay."""
    return "lora_unet_" + name.replace(".", "_", 1)


A = ALPHA / RANK
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
ROWS = {
    "musubi-tuner": Row(flat("lora_unet_"), KOHYA, alpha=True, scale=A),
    "musubi-tuner, converted": Row(native("diffusion_model."), adapter("default")),
    "musubi-tuner LoHa": Row(flat("lora_unet_"), alpha=True, scale=A, make=hadamard),
    "musubi-tuner LoKr": Row(
        flat("lora_unet_"), alpha=True, scale=A, make=kronecker, more={"lokr_factor": torch.tensor(-1)}
    ),
    "musubi-tuner LoKr, whole": Row(
        flat("lora_unet_"), alpha=True, scale=lambda factors: ALPHA / max(factors["lokr_w2"].shape),
        make=kronecker_whole, more={"lokr_factor": torch.tensor(-1)},
    ),
    "kohya with dotted tails": Row(dotted_tail, KOHYA, alpha=True, scale=A),
    "kohya with diffusers names": Row(flat_diffusers("lora_unet_"), KOHYA, alpha=True, scale=A),
    "VideoX-Fun": Row(flat("lora_unet__"), KOHYA, alpha=True, scale=A),
    "diffusion-pipe": Row(native("diffusion_model."), PEFT, config=CONFIG, scale=A),
    "ai-toolkit": Row(native("diffusion_model."), PEFT),
    "ai-toolkit LoKr": Row(native("diffusion_model."), alpha=True, make=kronecker_whole),
    "SimpleTuner": Row(
        diffusers("transformer."), PEFT, scale=A,
        metadata={"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in CONFIG.items()})},
    ),
    "SimpleTuner LyCORIS": Row(flat_diffusers("lycoris_"), alpha=True, scale=A, make=kronecker),
    "DiffSynth-Studio": Row(native(""), adapter("default")),
    "DiffSynth-Studio, with its prefix": Row(native("pipe.dit."), adapter("default")),
    "PEFT": Row(native("base_model.model."), PEFT, config=CONFIG, scale=A),
    "PEFT, state dict": Row(native(""), adapter("default_0"), config=CONFIG | {"use_rslora": True}, scale=ALPHA / 2),
    "diffusers": Row(diffusers("transformer."), PEFT),
    "diffusers, older": Row(
        diffusers("transformer."), {"down": "lora.down.weight", "up": "lora.up.weight"}
    ),
    "ComfyUI": Row(native("diffusion_model."), KOHYA, alpha=True, scale=A),
    "OneTrainer": Row(flat_diffusers("lora_transformer_"), KOHYA, alpha=True, scale=A),
    "lightx2v": Row(native("diffusion_model."), KOHYA),
    "lightx2v, differences": Row(native("diffusion_model."), make=whole),
    "talkingdit": Row(native("diffusion_model."), PEFT, alpha=True, scale=A),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_merged_weight_is_weight_plus_strength_times_change(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    torch.manual_seed(0)
    model = random_transformer(**SIZE)
    before = {module: model.get_parameter(f"{module}.weight").double() for module in LAYERS}
    state, wanted = dict(row.more), {}
    for module, other in LAYERS.items():
        factors, change = row.make(*before[module].shape)
        scale = row.scale(factors) if callable(row.scale) else row.scale
        wanted[module] = before[module] + STRENGTH * scale * change
        place = row.place(module, other)
        state |= {f"{place}.{row.ends.get(key, key)}": value for key, value in factors.items()}
        if row.alpha:
            state[f"{place}.alpha"] = torch.tensor(ALPHA)
    file = tmp_path / "style.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, file, row.metadata)
    if row.config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(row.config))

    loras = Loras(model)
    loras.load(file, strength=STRENGTH)
    x = draw(3, 32)
    for module in LAYERS:
        layer = model.get_submodule(module)
        given = x[:, : layer.in_features] if layer.in_features <= 32 else draw(3, layer.in_features)
        expected = given.double() @ wanted[module].T + layer.bias.double()
        torch.testing.assert_close(layer(given).double(), expected, rtol=1e-4, atol=1e-4)
    loras.merge()
    for module, weight in wanted.items():
        found = model.get_parameter(f"{module}.weight").double()
        assert (weight - before[module]).abs().max() > 0.05
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)
    loras.unload()
    for module, weight in before.items():
        assert torch.equal(model.get_parameter(f"{module}.weight").double(), weight)


def test_the_page_names_every_row() -> None:
    page = (ROOT / "docs" / "lora.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) \| `", page, re.MULTILINE)
    assert sorted(rows) == sorted(ROWS)


# ---- Values beside matrices ------------------------------------------------------------------------------------------


def test_differences_of_every_kind_of_parameter(tmp_path: Path) -> None:
    """As lightx2v writes its few-step files, and norms as LyCORIS does."""
    torch.manual_seed(0)
    model: WanS2VModel = random_transformer(**SIZE)
    keys = {
        "blocks.0.norm3.weight": "diffusion_model.blocks.0.norm3.diff",
        "blocks.0.norm3.bias": "diffusion_model.blocks.0.norm3.diff_b",
        "blocks.1.norm3.weight": "diffusion_model.blocks.1.norm3.w_norm",
        "blocks.1.norm3.bias": "diffusion_model.blocks.1.norm3.b_norm",
        "blocks.0.self_attn.o.bias": "diffusion_model.blocks.0.self_attn.o.diff_b",
        "blocks.0.self_attn.norm_q.weight": "transformer.blocks.0.attn1.norm_q.diff",
        "blocks.1.modulation": "diffusion_model.blocks.1.diff_m",
        "head.modulation": "diffusion_model.head.diff_m",
        "blocks.0.modulation": "diffusion_model.blocks.0.modulation.diff",
        "patch_embedding.weight": "diffusion_model.patch_embedding.diff",
        "head.head.bias": "lora_unet_head_head.diff_b",
        "casual_audio_encoder.weights": "diffusion_model.casual_audio_encoder.weights.diff",
        "trainable_cond_mask.weight": "diffusion_model.trainable_cond_mask.diff",
    }
    before = {name: model.get_parameter(name).double() for name in keys}
    values = {name: 0.1 * torch.randn(value.shape) for name, value in before.items()}
    save_file({key: values[name] for name, key in keys.items()}, tmp_path / "few_steps.safetensors")
    loras = Loras(model)
    report = loras.load(tmp_path / "few_steps.safetensors", strength=STRENGTH)
    assert (report.adapted, report.changed) == (0, len(keys))
    for name, value in values.items():
        wanted = before[name] + STRENGTH * value.double()
        torch.testing.assert_close(model.get_parameter(name).double(), wanted, rtol=1e-6, atol=1e-6)
    loras.unload()
    assert all(torch.equal(model.get_parameter(name).double(), value) for name, value in before.items())


@pytest.mark.parametrize("beside", [True, False])
def test_the_bias_of_peft_is_scaled_as_its_matrices_are(beside: bool, tmp_path: Path) -> None:
    """lora_bias adds scale * B(A(x)), where B has a bias, so the bias gets the scale as well."""
    torch.manual_seed(0)
    model = random_transformer(**SIZE)
    layer = model.blocks[0].self_attn.q
    weight, bias = layer.weight.double(), layer.bias.double()
    down, up, added = 0.3 * draw(8, 32), draw(32, 8), draw(32)
    state = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": added}
    folder = tmp_path if beside else tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.blocks.0.self_attn.q.{key}": value for key, value in state.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 1, "lora_bias": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loras = Loras(model)
    loras.load(folder / "adapter_model.safetensors" if beside else folder, strength=STRENGTH)
    loras.merge()
    torch.testing.assert_close(layer.weight.double(), weight + STRENGTH / 8 * up.double() @ down.double())
    torch.testing.assert_close(layer.bias.double(), bias + STRENGTH / 8 * added.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_ranks_and_alphas_by_pattern_are_those_of_peft(tmp_path: Path) -> None:
    """Against PEFT itself: it writes the file and its own merged weights are the truth."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = random_transformer(**SIZE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, lora_bias=True, init_lora_weights=False,
        target_modules=["self_attn.q", "self_attn.k", "ffn.0", "ffn.2"],
        rank_pattern={"ffn.2": 2, r"blocks\.1\.self_attn\.q": 8}, alpha_pattern={"ffn.0": 3, r"^blocks\.0\.ffn\.2": 5},
    )  # fmt: skip
    adapted = get_peft_model(random_transformer(**SIZE), config)
    adapted.base_model.model.load_state_dict(_under_adapters(adapted, before), strict=False)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name and name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path)
    wanted = adapted.merge_and_unload().state_dict()

    loras = Loras(model)
    report = loras.load(tmp_path)
    assert report.adapted == 8
    loras.merge()
    for name, value in wanted.items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-5)
    assert (wanted["blocks.0.ffn.2.weight"] - before["blocks.0.ffn.2.weight"]).abs().max() > 0.1


def _under_adapters(adapted: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict by the names that a model has under PEFT's layers."""
    names = set(adapted.base_model.model.state_dict())
    return {name if name in names else ".base_layer.".join(name.rsplit(".", 1)): value for name, value in state.items()}
