# SPDX-License-Identifier: Apache-2.0
"""Adapters on one card: frozen weights in fewer bits, inputs of blocks narrower or elsewhere, and what that changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_networks import make_networks, sample_losses
from torch import Tensor, nn
from torch.nn import functional

from talkingdit.errors import UserError
from training import parallel
from training.activations import Waiting
from training.config import Config, read_toml
from training.frozen import EIGHT_BITS, FrozenLinear, check_frozen, frozen_layers, narrow, quantise
from training.lora import add_adapters
from training.parallel import clip_gradients, load_weights, shard
from training.sections import LoraConfig, ModelConfig, ParallelConfig


@pytest.fixture
def alone() -> Iterator[None]:
    yield
    parallel.stop()


# ---- Eight bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config"), [("int8", "Int8WeightOnlyConfig"), ("fp8", "Float8WeightOnlyConfig")])
def test_eight_bits_lose_no_more_than_torchao(kind: str, config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 48)[:, None]
    codes, scale = quantise(weight, kind)
    assert (codes.dtype, scale.shape) == (EIGHT_BITS[kind][0], (48, 1))
    ours = codes.double() * scale.double() - weight.double()
    theirs = nn.Sequential(nn.Linear(256, 48, bias=False))
    theirs[0].weight = nn.Parameter(weight.clone())
    quantization.quantize_(theirs, getattr(quantization, config)())
    other = theirs[0].weight.dequantize().double() - weight.double()
    assert ours.norm(dim=1).div(weight.double().norm(dim=1)).max() <= 1.02 * (
        other.norm(dim=1).div(weight.double().norm(dim=1)).max()
    )
    if kind == "int8":
        assert (ours.abs() <= 0.5001 * scale).all()  # half a step


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite(kind: str) -> None:
    weight = torch.zeros(3, 4)
    weight[1] = torch.finfo(torch.float32).tiny
    weight[2, 0] = 3e38
    codes, scale = quantise(weight, kind)
    back = codes.float() * scale
    assert back.isfinite().all()
    assert (back[0] == 0).all()
    torch.testing.assert_close(back[2], weight[2])


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_multiplies_by_what_it_stores(kind: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(24, 10)
    frozen = FrozenLinear(layer, kind, torch.device("cpu"))
    frozen.fill(layer.weight.detach())
    x = torch.randn(5, 7, 24).to(dtype).requires_grad_()
    y = frozen(x)
    assert y.dtype == dtype
    gradient = torch.randn(5, 7, 10).to(dtype)
    y.backward(gradient)
    codes, scale = quantise(layer.weight.detach(), kind)
    weight = codes.double() * scale.double()
    wide = x.detach().double().requires_grad_()
    want = functional.linear(wide, weight, layer.bias.double())
    want.backward(gradient.double())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), want, **tolerance)
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, **tolerance)
    torch.testing.assert_close(frozen.weight.double(), weight, rtol=1e-6, atol=0)
    assert [name for name, _ in frozen.named_parameters()] == ["bias"]
    assert list(frozen.buffers()) == []


# ---- A step ----------------------------------------------------------------------------------------------------------


def step_of(
    folder: Path, frozen: str = "float32", inputs: str = "float32", precision: str = "fp32", swap: int = 0
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two steps and the gradients of the last, of adapters on the weights of `folder`."""
    networks = make_networks(text_encoder=True)
    torch.manual_seed(3)
    add_adapters(networks.transformer, LoraConfig(rank=2))
    for name, parameter in networks.transformer.named_parameters():
        if ".lora_B." in name:  # else the other half has no gradient yet
            nn.init.normal_(parameter, std=0.05)
    assert networks.text_encoder is not None
    networks.text_encoder.requires_grad_(False)
    adapters = {name: p.detach().clone() for name, p in networks.named_parameters() if ".lora_" in name}
    config: Any = ParallelConfig(precision=precision, activation_checkpointing="full", inputs=inputs)  # type: ignore[arg-type]
    mesh = parallel.start(config, "cpu")
    trained = {name for name in adapters}
    model = ModelConfig(frozen=frozen, swap=swap)  # type: ignore[arg-type]
    narrow(networks.transformer, networks.family.units, model, trained, mesh.device, config.offload)
    shard(networks, mesh, config, narrow=frozen != "float32")
    load_weights(networks, folder)
    optimizer = torch.optim.SGD([p for p in networks.parameters() if p.requires_grad], lr=0.1)
    losses, gradients = [], {}
    for step in range(2):
        loss = sample_losses(networks, step, [0, 1, 2, 3]).mean()
        loss.backward()
        clip_gradients(networks, 1e9)
        gradients = {n: p.grad.to_local().clone() for n, p in networks.named_parameters() if p.grad is not None}  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    parallel.stop()
    assert gradients.keys() == {name for name in gradients if ".lora_" in name}
    return losses, gradients


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of these networks, in bfloat16 as released ones are."""
    folder = tmp_path_factory.mktemp("start")
    networks = make_networks(seed=1).to(torch.bfloat16)
    networks.transformer.save_pretrained(folder / "transformer")
    (folder / "text_encoder").mkdir()
    state = {name: value.contiguous() for name, value in networks.text_encoder.state_dict().items()}
    save_file(state, folder / "text_encoder" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all gradients together, the difference relative to their norm."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    return (difference / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_in_bfloat16_and_inputs_on_the_host_change_nothing(start: Path, precision: str) -> None:
    losses, gradients = step_of(start, precision=precision)
    for changes in ({"frozen": "bf16"}, {"inputs": "host"}, {"frozen": "bf16", "inputs": "host"}):
        found, other = step_of(start, precision=precision, **changes)
        assert found == losses, changes
        assert all(torch.equal(other[name], value) for name, value in gradients.items()), changes


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"inputs": "bf16"}, 0.01),
        ({"inputs": "host_bf16"}, 0.01),
        ({"frozen": "int8"}, 0.03),
        ({"frozen": "fp8"}, 0.15),
        ({"frozen": "int8", "inputs": "host_bf16", "swap": 2}, 0.03),
    ],
)
def test_what_rounds_stays_near_what_does_not(start: Path, changes: dict[str, Any], most: float) -> None:
    losses, gradients = step_of(start)
    found, other = step_of(start, **changes)
    assert found == pytest.approx(losses, rel=most / 2)
    assert 0 < largest(other, gradients) < most


def test_only_matrices_of_large_units_that_do_not_train_are_in_eight_bits(start: Path, alone: None) -> None:
    networks = make_networks()
    add_adapters(networks.transformer, LoraConfig(rank=2))
    trained = {f"transformer.{n}" for n, _ in networks.transformer.named_parameters() if ".lora_" in n}
    units = networks.family.units
    narrow(networks.transformer, units, ModelConfig(frozen="int8"), trained, torch.device("cpu"), False)
    found = frozen_layers(networks.transformer)
    assert all(name.startswith(("blocks.", "audio_injector.injector.")) for name in found)
    plain = {n for n, m in make_networks().transformer.named_modules() if isinstance(m, nn.Linear)}
    large = {f"{n}.weight" for n in plain if n.startswith(("blocks.", "audio_injector.injector."))}
    assert set(found) == large
    left = {name: p.dtype for name, p in networks.transformer.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in left.items() if ".lora_" in name)
    assert left["head.head.weight"] == torch.float32  # computes in float32
    assert left["blocks.0.self_attn.norm_q.weight"] == torch.bfloat16


def test_the_stream_is_gone_between_forward_and_backward() -> None:
    x = torch.randn(3, 4, requires_grad=True) * 2
    seen = weakref.ref(x)
    waiting = Waiting(x, "bf16")
    taken = waiting.take()
    assert taken is x
    del x, taken
    gc.collect()
    assert seen() is None
    again = waiting.take()
    assert (again.dtype, again.requires_grad, again.grad_fn) == (torch.float32, True, None)


@pytest.mark.parametrize(
    ("model", "rank", "trained", "said"),
    [
        (ModelConfig(frozen="int8"), 4, {"a.lora_A.weight"}, "needs model.start, weights to store so; got none"),
        (ModelConfig(frozen="fp8", start=Path("x")), 0, {"a"}, "train adapters alone, got one in which a trains"),
        (ModelConfig(frozen="int8", start=Path("x")), 4, {"a.lora_A.weight", "head"}, "in which head trains"),
        (ModelConfig(frozen="bf16", swap=3), 4, {"a.lora_A.weight"}, 'got 3 with model.frozen = "bf16"'),
    ],
)
def test_what_cannot_be_in_eight_bits_is_refused(model: ModelConfig, rank: int, trained: set[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_frozen(model, rank, trained)


def test_inputs_without_checkpointing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[parallel]\ninputs = "host"\n')
    with pytest.raises(ValueError, match=r'parallel\.activation_checkpointing is "off"'):
        read_toml(tmp_path / "run.toml")
    assert Config().parallel.inputs == "float32"
