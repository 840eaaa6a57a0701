# SPDX-License-Identifier: Apache-2.0
"""Training with forward products in float8: what is rounded and what is not, emulated on the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_networks import backward, make_networks
from torch import Tensor, nn

from talkingdit.errors import UserError
from talkingdit.nn.eight_bit import EightBitLinear
from training import parallel
from training.float8 import use_float8
from training.networks import Networks
from training.parallel import shard
from training.sections import ParallelConfig

pytest.importorskip("torchao.float8")
CPU = torch.device("cpu")
KINDS = ["forward", "rowwise"]


@pytest.fixture
def alone() -> Iterator[None]:
    yield
    parallel.stop()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def networks_in(kind: str) -> tuple[Networks, list[str]]:
    networks = make_networks(num_layers=2)
    return networks, use_float8(networks, ParallelConfig(float8=kind), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_rounds_what_it_should_and_no_more(kind: str) -> None:
    """The forward is that of an inference layer in float8, the gradient of weights that of a plain one."""
    networks, paths = networks_in(kind)
    layer = networks.transformer.get_submodule(paths[0])
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.load_state_dict(layer.state_dict())
    inputs = [torch.randn(2, 9, layer.in_features, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    gradient = torch.randn(2, 9, layer.out_features)
    outputs = [one(x) for one, x in zip((layer, plain), inputs, strict=True)]
    rounded = EightBitLinear(plain, "fp8")(inputs[0].detach())
    assert relative(outputs[0], rounded) < (1e-6 if kind == "forward" else 0.08)  # its scales are powers of two
    for output in outputs:
        output.backward(gradient)
    assert relative(layer.weight.grad, plain.weight.grad) < 1e-6
    error = relative(inputs[0].grad, inputs[1].grad)
    assert error < 1e-6 if kind == "forward" else 1e-3 < error < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_nearly_that_of_unrounded_layers(kind: str) -> None:
    (networks, paths), plain = networks_in(kind), make_networks(num_layers=2)
    assert {path.split(".")[0] for path in paths} == {"blocks", "audio_injector"}
    assert list(networks.state_dict()) == list(plain.state_dict())
    losses = [backward(one, 0) for one in (networks, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    gradients = [
        torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]) for one in (networks, plain)
    ]
    assert relative(*gradients) < 0.15


def test_it_learns_sharded_and_in_bfloat16(alone: None) -> None:
    networks, _ = networks_in("forward")
    config = ParallelConfig(float8="forward", activation_checkpointing="full")
    shard(networks, parallel.start(config, "cpu"), config)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        losses.append(backward(networks, 0))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_without_a_layer_that_fits_it_is_refused() -> None:
    networks = make_networks(num_layers=2)
    for module in list(networks.transformer.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, nn.Linear(layer.in_features - 1, layer.out_features))
    with pytest.raises(UserError, match=r"parallel\.float8: no large layer has sizes that are multiples of 16"):
        use_float8(networks, ParallelConfig(float8="forward"), CPU)
