# SPDX-License-Identifier: Apache-2.0
"""LoRAs on models whose weights wait elsewhere or are stored narrow: the effect is in what the model answers."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from forked import run
from official import random_transformer
from safetensors.torch import save_file
from torch import Tensor, nn

from talkingdit.checkpoints.in_place import InPlace
from talkingdit.checkpoints.lora import Loras
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v import units
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.load import load
from talkingdit.models import WanS2VModel
from talkingdit.pipelines.memory import Memory, fit

SIZE: dict[str, Any] = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "freq_dim": 16, "text_dim": 24, "text_len": 10},
    **{"audio_dim": 8, "audio_layers": 5, "audio_inject_layers": (0,)},
}
LAYERS = ("blocks.0.self_attn.q", "blocks.1.ffn.2", "audio_injector.injector.0.v", "text_embedding.2", "head.head")
# In place also without merging: a norm, a modulation, a convolution, a bias.
VALUES = {
    "blocks.0.norm3.weight": "blocks.0.norm3.diff",
    "blocks.1.modulation": "blocks.1.diff_m",
    "patch_embedding.weight": "patch_embedding.diff",
    "blocks.1.self_attn.k.bias": "blocks.1.self_attn.k.diff_b",
}
STRENGTH = 0.6


def build(dtype: torch.dtype = torch.float32, **more: Any) -> WanS2VModel:
    torch.manual_seed(0)
    model = random_transformer(**SIZE, **more)
    kept = model._keep_in_fp32_modules
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def changes() -> dict[str, tuple[Tensor, Tensor] | Tensor]:
    """What a file holds: down and up of layers, differences of other parameters."""
    model = build()
    torch.manual_seed(1)
    found: dict[str, Any] = {}
    for module in LAYERS:
        rows, columns = model.get_parameter(f"{module}.weight").shape
        found[f"{module}.weight"] = (0.3 * torch.randn(4, columns), torch.randn(rows, 4))
    return found | {name: 0.2 * torch.randn(model.get_parameter(name).shape) for name in VALUES}


@pytest.fixture
def file(changes: dict[str, Any], tmp_path: Path) -> Path:
    state = {}
    for name, change in changes.items():
        module = name.rpartition(".")[0]
        if isinstance(change, tuple):
            state |= {f"{module}.lora_A.weight": change[0].clone(), f"{module}.lora_B.weight": change[1].clone()}
        else:
            state[VALUES[name]] = change.clone()
    save_file(state, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def truth(changes: dict[str, Any], strength: float, **more: Any) -> WanS2VModel:
    """A model of the changed weights, made by hand."""
    model = build(**more)
    for name, change in changes.items():
        delta = change[1].double() @ change[0].double() if isinstance(change, tuple) else change.double()
        parameter = model.get_parameter(name)
        parameter.data = (parameter.double() + strength * delta).to(parameter.dtype)
    return model


@torch.no_grad()
def answer(model: WanS2VModel) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, text, audio = (torch.randn(s, generator=generator) for s in ((1, 16, 2, 4, 4), (1, 6, 24), (1, 5, 8, 8)))
    given = WanInputs(text, audio=audio, reference=latents[:, :, :1], size=(2, 4, 4))
    direct = model(latents, torch.tensor([300.0]), given)
    made_once = model(latents, torch.tensor([300.0]), model.encode_conditions(given))
    torch.testing.assert_close(made_once, direct, rtol=1e-4, atol=1e-4)
    return direct.float()


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def offload(level: str, disk: bool = False) -> Callable[[WanS2VModel, Path], None]:
    def set_up(model: WanS2VModel, folder: Path) -> None:
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_type=f"{level}_level",
            num_blocks_per_group=1 if level == "block" else None,
            **({"offload_to_disk_path": str(folder / "disk")} if disk else {}),
        )

    return set_up


MODES: dict[str, Callable[[WanS2VModel, Path], None]] = {
    "resident": lambda model, folder: None,
    "block": offload("block"),
    "leaf": offload("leaf"),
    "block on disk": offload("block", disk=True),
    "leaf on disk": offload("leaf", disk=True),
}


def hashes(folder: Path) -> dict[str, str]:
    """Of all files in a folder; a folder in it counts too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("first", ["offload", "load"])
@pytest.mark.parametrize("mode", MODES)
def test_the_effect_is_the_same_wherever_weights_wait(
    mode: str, first: str, changes: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    plain = answer(build())
    wanted = {strength: answer(truth(changes, strength)) for strength in (STRENGTH, -0.3)}
    assert distance(wanted[STRENGTH], plain) > 0.05
    assert distance(wanted[-0.3], plain) > 0.05
    model = build()
    loras = Loras(model)
    if first == "load":
        loras.load(file, strength=STRENGTH)
    MODES[mode](model, tmp_path)
    on_disk = hashes(tmp_path / "disk")
    if first == "offload":
        loras.load(file, strength=STRENGTH)
    assert distance(answer(model), wanted[STRENGTH]) < 1e-5
    for _ in range(2):
        loras.merge()
        assert distance(answer(model), wanted[STRENGTH]) < 1e-5
        loras.set_strength("style", -0.3)
        assert distance(answer(model), wanted[-0.3]) < 1e-5
        loras.unmerge()
        assert distance(answer(model), wanted[-0.3]) < 1e-5
        loras.set_strength("style", STRENGTH)
        assert distance(answer(model), wanted[STRENGTH]) < 1e-5
    loras.unload()
    assert torch.equal(answer(model), plain)
    if first == "offload":
        assert hashes(tmp_path / "disk") == on_disk  # diffusers takes these files up again in another run


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_with_streams_the_copy_in_host_memory_counts(
    level: str, changes: dict[str, Any], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA a parameter is a copy on the card while its layer runs, and after that a copy that stays in host memory.

    This is done here without a card: what is written into the parameter alone is gone after the next use.
    """
    from diffusers.hooks.group_offloading import ModuleGroup

    def tensors(group: ModuleGroup) -> list[Tensor]:
        return [*(p for module in group.modules for p in module.parameters()), *group.parameters]

    def use(change: Callable[[Tensor], Tensor]) -> Callable[[ModuleGroup], None]:
        def run(group: ModuleGroup) -> None:
            for tensor in tensors(group):
                tensor.data = change(group.cpu_param_dict[tensor])

        return run

    monkeypatch.setattr(ModuleGroup, "_init_cpu_param_dict", lambda group: {t: t.data.clone() for t in tensors(group)})
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", use(Tensor.clone))
    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", use(lambda tensor: tensor))
    plain, wanted = answer(build()), answer(truth(changes, STRENGTH))
    model = build()
    offload(level)(model, tmp_path)
    assert torch.equal(answer(model), plain)

    def fetch_in_advance() -> None:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()

    loras = Loras(model)
    fetch_in_advance()
    loras.load(file, strength=STRENGTH)
    assert distance(answer(model), wanted) < 1e-5
    fetch_in_advance()
    loras.merge()
    assert distance(answer(model), wanted) < 1e-5
    fetch_in_advance()
    loras.unload()
    assert torch.equal(answer(model), plain)


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_merged_for_good_on_disk_and_nothing_of_it_in_the_files_of_other_runs(
    level: str, changes: dict[str, Any], file: Path, tmp_path: Path
) -> None:
    plain, wanted = answer(build()), answer(truth(changes, 1.0))
    model = build()
    offload(level, disk=True)(model, tmp_path)
    on_disk = hashes(tmp_path / "disk")
    loras = Loras(model)
    loras.load(file)
    loras.merge(keep_originals=False)
    assert distance(answer(model), wanted) < 1e-5
    with pytest.raises(UserError, match="merged without keeping the original weights"):
        loras.unload()
    assert {name: value for name, value in hashes(tmp_path / "disk").items() if name in on_disk} == on_disk
    other = build()  # another run with the same folder
    offload(level, disk=True)(other, tmp_path)
    assert distance(answer(other), plain) < 1e-6


def killed_in_a_merge(file: Path, folder: Path) -> None:
    """As the library leaves it that is killed while it writes the second of the changed files."""
    model = build()
    offload("block", disk=True)(model, folder)
    loras = Loras(model)
    loras.load(file)
    really, written = safetensors.torch.save_file, []

    def killed(tensors: dict[str, Tensor], path: Path, *more: Any) -> None:
        if written:
            Path(path).with_name(".tmpAbCdEf").write_bytes(b"x" * 5000)
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        really(tensors, path, *more)

    safetensors.torch.save_file = killed
    loras.merge()


def test_what_a_killed_merge_leaves_on_disk_is_removed_by_the_next_change(file: Path, tmp_path: Path) -> None:
    assert run(killed_in_a_merge, file, tmp_path) == -signal.SIGKILL
    left = {name for name in hashes(tmp_path / "disk") if name.startswith(".")}
    assert sum(name.endswith(".tmpAbCdEf") for name in left) == 1
    model, living = build(), build()
    for one in (living, model):
        offload("block", disk=True)(one, tmp_path)
    others, loras = Loras(living), Loras(model)
    others.load(file)
    others.merge()
    theirs = {name for name in hashes(tmp_path / "disk") if name.startswith(".")}
    assert theirs
    assert not theirs & left
    loras.load(file)
    loras.merge()
    assert theirs < hashes(tmp_path / "disk").keys()  # not what a living process computes with
    others.unload()
    loras.unload()
    assert not [name for name in hashes(tmp_path / "disk") if name.startswith(".")]


def test_adapters_compute_in_the_dtype_of_the_layer_where_weights_are_cast_to_fp8(
    changes: dict[str, Any], file: Path
) -> None:
    """What a layer adds is exact to bfloat16, not to the 3 bits of float8; so is a small difference of a bias."""
    model = build(torch.bfloat16)
    fit(model, Memory(weights="cast_fp8"), "cpu", units)
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    before = {module: model.get_submodule(module) for module in LAYERS}
    x = {module: torch.randn(5, layer.in_features).bfloat16() for module, layer in before.items()}
    without = {module: layer(x[module]).double() for module, layer in before.items()}
    zero = torch.zeros(1, 32, dtype=torch.bfloat16)
    bias = model.blocks[1].self_attn.k(zero).double()
    loras = Loras(model)
    loras.load(file, strength=STRENGTH)
    assert model.blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    for module, layer in before.items():
        down, up = (part.double() for part in changes[f"{module}.weight"])
        added = STRENGTH * (x[module].double() @ down.T) @ up.T
        assert distance(layer(x[module]).double(), without[module] + added) < 1e-2
    moved = model.blocks[1].self_attn.k(zero).double() - bias
    assert distance(moved[0], STRENGTH * changes["blocks.1.self_attn.k.bias"].double()) < 1e-2
    assert torch.isfinite(answer(model)).all()
    with pytest.raises(UserError, match="cannot be merged into quantised weights; use it unmerged"):
        loras.merge()
    loras.unload()
    after = model.state_dict()
    assert all(torch.equal(after[n].float(), v.float()) and after[n].dtype == v.dtype for n, v in stored.items())


@pytest.mark.parametrize("mode", [m for m in MODES if m != "resident"])
def test_fp8_and_offloading_together(mode: str, changes: dict[str, Any], file: Path, tmp_path: Path) -> None:
    resident = build(torch.bfloat16)
    fit(resident, Memory(weights="cast_fp8"), "cpu", units)
    Loras(resident).load(file, strength=STRENGTH)
    wanted = answer(resident)
    model = build(torch.bfloat16)
    fit(model, Memory(weights="cast_fp8"), "cpu", units)
    plain = answer(model)
    MODES[mode](model, tmp_path)
    Loras(model).load(file, strength=STRENGTH)
    assert distance(plain, wanted) > 0.05
    assert distance(answer(model), wanted) < 1e-2


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("first", ["quantise", "load"])
def test_quantised_weights_get_adapters(kind: str, first: str, changes: dict[str, Any], file: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is an optional extra")
    wanted, plain = answer(truth(changes, STRENGTH)), answer(build())
    model = build(torch.bfloat16)
    loras = Loras(model)
    if first == "load":
        loras.load(file, strength=STRENGTH)
    fit(model, Memory(weights=kind), "cpu", units)
    if first == "quantise":
        loras.load(file, strength=STRENGTH)
    assert type(model.blocks[0].self_attn.q.weight.data) is not Tensor
    assert distance(answer(model), wanted) < 0.3 * distance(plain, wanted)
    with pytest.raises(UserError, match="cannot be merged into quantised weights"):
        loras.merge()


def test_absorbed_audio_attention_hears_of_adapters(changes: dict[str, Any], file: Path) -> None:
    """It folds weights of layers into others, which must be the changed ones."""
    model = build(audio_absorb="value")
    Loras(model).load(file, strength=STRENGTH)
    assert distance(answer(model), answer(truth(changes, STRENGTH))) < 1e-4


def test_blocks_compile_with_adapters(changes: dict[str, Any], file: Path) -> None:
    model = build()
    loras = Loras(model)
    loras.load(file, strength=STRENGTH)
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="eager")
    assert distance(answer(model), answer(truth(changes, STRENGTH))) < 1e-5
    loras.set_strength("style", -0.3)
    assert distance(answer(model), answer(truth(changes, -0.3))) < 1e-5


def test_a_model_with_adapters_is_not_saved_as_if_it_had_none(file: Path, tmp_path: Path) -> None:
    model = build()
    loras = Loras(model)
    loras.load(file)
    with pytest.raises(UserError, match="the model has adapters; merge or unload them before it is saved"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    loras.merge()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(answer(load(tmp_path / "saved")), answer(model))


def test_weights_that_accelerate_keeps_in_host_memory_change_there() -> None:
    from accelerate import cpu_offload

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    x = torch.randn(2, 4)
    plain, delta = model(x), 0.5 * torch.randn(4, 4)
    wanted = model[1](x @ (model[0].weight + delta).T + model[0].bias)
    cpu_offload(model, torch.device("cpu"))
    assert model[0].weight.is_meta
    in_place = InPlace(model)
    in_place.change(["0.weight"], lambda name, original: original + delta)
    torch.testing.assert_close(model(x), wanted)
    in_place.change([], lambda name, original: original)
    assert torch.equal(model(x), plain)


def test_weights_that_accelerate_keeps_on_disk_are_refused(tmp_path: Path) -> None:
    from accelerate import disk_offload

    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    disk_offload(model, str(tmp_path), torch.device("cpu"))
    with pytest.raises(UserError, match="load LoRAs before accelerate's offloading is set up"):
        InPlace(model).change(["0.weight"], lambda name, original: original)
