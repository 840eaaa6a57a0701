# SPDX-License-Identifier: Apache-2.0
"""LoRA files that cannot be applied, or only in part: one sentence that names the part, and the model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from official import random_transformer
from safetensors.torch import save_file
from torch import Tensor

from talkingdit.checkpoints.lora import Loras
from talkingdit.errors import UserError
from talkingdit.models import WanS2VModel

SIZE: dict[str, Any] = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 24, "text_len": 10},
    **{"audio_dim": 8, "audio_layers": 5, "audio_inject_layers": (0,)},
}
Q = "blocks.0.self_attn.q"
DOWN, UP = 0.3 * torch.randn(4, 32), torch.randn(32, 4)
PAIR = {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP}
NAN = torch.full((32, 4), float("nan"))


@pytest.fixture
def model() -> WanS2VModel:
    torch.manual_seed(0)
    return random_transformer(**SIZE)


def write(path: Path, state: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    save_file({key: value.clone() for key, value in state.items()}, path)
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (PAIR | {f"{Q}.dora_scale": torch.ones(32, 1)}, r"q\.dora_scale is a part of DoRA, which is not supported"),
        (PAIR | {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "is a part of DoRA"),
        (PAIR | {f"{Q}.lora_magnitude_vector.default.weight": torch.ones(32)}, "is a part of DoRA"),
        (PAIR | {f"{Q}.lora_mid.weight": torch.ones(4, 4)}, "is a part of a Tucker decomposition"),
        ({f"{Q}.oft_blocks": torch.ones(2, 2)}, "is a part of OFT"),
        ({f"{Q}.lora_A.one.weight": DOWN, f"{Q}.lora_B.other.weight": UP}, r"holds 2 adapters \(one, other\)"),
        (PAIR | {f"diffusion_model.{Q}.lora_A.weight": DOWN}, "are the same part of blocks.0.self_attn.q"),
        ({f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UP[:, :3]}, r"do not belong together: \[4, 32\] and \[32"),
        ({f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": NAN}, r"lora_B\.weight has values that are not finite"),
        (PAIR | {f"{Q}.alpha": torch.tensor(float("inf"))}, r"alpha has values that are not finite"),
        (PAIR | {f"{Q}.alpha": torch.ones(2)}, r"alpha of blocks\.0\.self_attn\.q must be one number, got \[2\]"),
        ({f"{Q}.hada_w1_a": UP, f"{Q}.hada_w1_b": DOWN}, "has only one of the two matrices"),
        ({f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2_a": torch.ones(8, 2)}, "has only one of the two matrices"),
        ({f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2": torch.ones(8, 9)}, r"not fit its weight \[32, 32\]"),
        ({"blocks.0.norm3.lora_A.weight": DOWN, "blocks.0.norm3.lora_B.weight": UP}, r"does not fit its weight \[32\]"),
        ({f"{Q}.weight": torch.ones(32, 32)}, "holds whole weights and no LoRA; it may be a checkpoint"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": DOWN}, "for layers that the model does not have: model."),
        ({"lora_te_text_model.lora_down.weight": DOWN}, "has parts for layers that the model does not have: lora_te_"),
        ({"something": DOWN}, r"not a LoRA file of a kind that is supported \(something\)"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}, "must hold floating point numbers"),
    ],
)  # fmt: skip
def test_files(model: WanS2VModel, state: dict[str, Tensor], sentence: str, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loras = Loras(model)
    with pytest.raises(UserError, match=sentence) as caught:
        loras.load(write(tmp_path / "a.safetensors", state))
    assert "\n" not in str(caught.value)
    assert loras.strengths == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"use_dora": True}, "adapter_config.json: a DoRA adapter, which is not supported"),
        ({"peft_type": "VERA"}, "an adapter of kind VERA, only LORA, LOHA, LOKR are supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "begun with pissa_niter_4, which changes the base weights"),
        (
            {"r": 8, "lora_alpha": 8},
            r"adapter_config\.json: is for rank 8 of blocks\.0\.self_attn\.q, and the file has",
        ),
        ({"r": "four"}, "r must be a positive number, got 'four'"),
        ({"r": 4, "lora_alpha": -1}, "lora_alpha must be a positive number, got -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a positive number, got nan"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a positive number, got 10000"),
        ({"alpha_pattern": {"q": "four"}}, "alpha_pattern must map names of modules to numbers, got 'four'"),
        ({"alpha_pattern": {"q": float("inf")}}, "alpha_pattern must map names of modules to numbers, got inf"),
        ({"rank_pattern": {"q": 10**400}}, "rank_pattern must map names of modules to numbers, got 10000"),
        ({"rank_pattern": {"(([a-z0-9._])+)+!": 4}}, "rank_pattern has a pattern that takes too long to search"),
        ({"alpha_pattern": {"(.|.)*!": 4}}, "alpha_pattern has a pattern that takes too long to search"),
        ({"alpha_pattern": {".*.*.*.*.*.*!": 4}}, "alpha_pattern has a pattern that takes too long to search"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern must map names of modules to numbers"),
    ],
)
def test_configurations(model: WanS2VModel, config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        Loras(model).load(write(tmp_path / "adapter_model.safetensors", PAIR, config))


def test_a_configuration_that_is_no_json(model: WanS2VModel, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json: not a readable JSON file"):
        Loras(model).load(write(tmp_path / "a.safetensors", PAIR))


def test_alphas_in_the_file_go_before_a_configuration_beside_it(model: WanS2VModel, tmp_path: Path) -> None:
    """A folder of LoRAs of other trainers may have a stray configuration in it."""
    before = model.get_parameter(f"{Q}.weight").double()
    file = write(tmp_path / "a.safetensors", PAIR | {f"{Q}.alpha": torch.tensor(2.0)}, {"r": 64, "lora_alpha": 64})
    loras = Loras(model)
    loras.load(file)
    loras.merge()
    torch.testing.assert_close(model.get_parameter(f"{Q}.weight").double(), before + 0.5 * UP.double() @ DOWN.double())


def test_what_fits_is_applied_on_demand_and_the_rest_named(model: WanS2VModel, tmp_path: Path) -> None:
    other = {
        "blocks.7.self_attn.q.lora_A.weight": DOWN,
        "blocks.7.self_attn.q.lora_B.weight": UP,
        "blocks.0.ffn.0.lora_A.weight": DOWN,
        "blocks.0.ffn.0.lora_B.weight": UP,
        "blocks.0.self_attn.k.diff_b": torch.ones(5),
        "blocks.0.self_attn.norm_q.diff_b": torch.ones(32),
        "blocks.0.strange": torch.ones(5),
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = write(tmp_path / "a.safetensors", PAIR | other)
    loras = Loras(model)
    with pytest.raises(UserError, match="Nothing of it was applied; `--lora-partial`") as caught:
        loras.load(file)
    assert "blocks.7.self_attn.q" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = loras.load(file, strength=0.5, partial=True)
    assert (report.adapted, report.changed) == (1, 0)
    for part in (
        "blocks.7.self_attn.q",
        "blocks.0.strange",
        "matrices of blocks.0.ffn.0",
        "changes blocks.0.self_attn.k",
    ):
        assert part in str(report), part
    assert "changes blocks.0.self_attn.norm_q.bias by [32], which there is not" in report.left
    loras.merge()
    for name, value in model.state_dict().items():
        wanted = before[name].double()
        if name == f"{Q}.weight":
            wanted = wanted + 0.5 * UP.double() @ DOWN.double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_file_without_a_part_that_fits_is_refused_also_in_part(model: WanS2VModel, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {f"blocks.7.{key.split('.', 2)[2]}": value for key, value in PAIR.items()})
    with pytest.raises(UserError, match=r"holds nothing for this model \(has parts for layers .*blocks\.7"):
        Loras(model).load(file, partial=True)


def test_new_values_of_whole_weights_take_their_share(model: WanS2VModel, tmp_path: Path) -> None:
    """PEFT's modules_to_save and trained biases: at strength s a weight is (1 - s) old + s new."""
    new = {
        "head.head.weight": ("base_model.model.head.head.weight", torch.randn(64, 32)),
        "blocks.1.ffn.0.bias": ("base_model.model.blocks.1.ffn.0.bias", torch.randn(48)),
        "blocks.0.norm3.weight": ("diffusion_model.blocks.0.norm3.set_weight", torch.randn(32)),
    }
    before = {name: model.get_parameter(name).double() for name in new}
    state = {f"base_model.model.{key}": value for key, value in PAIR.items()} | dict(new.values())
    loras = Loras(model)
    loras.load(write(tmp_path / "a.safetensors", state), strength=0.25)
    for name, (_, value) in new.items():
        wanted = 0.75 * before[name] + 0.25 * value.double()
        torch.testing.assert_close(model.get_parameter(name).double(), wanted, rtol=1e-5, atol=1e-5)
    loras.set_strength("a", 1.0)
    for name, (_, value) in new.items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-5, atol=1e-5)


def test_strengths_that_are_no_numbers(model: WanS2VModel, tmp_path: Path) -> None:
    loras = Loras(model)
    file = write(tmp_path / "a.safetensors", PAIR)
    with pytest.raises(ValueError, match="strength must be a number, got nan"):
        loras.load(file, strength=float("nan"))
    loras.load(file)
    with pytest.raises(ValueError, match="strength must be a number, got inf"):
        loras.set_strength("a", float("inf"))
    with pytest.raises(ValueError, match="the model has adapters already"):
        Loras(model)
