# SPDX-License-Identifier: Apache-2.0
"""Feed-forward networks in slices, written in place: the bits of the network itself, and nothing left out around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.traffic import Traffic
from talkingdit.families.hunyuan_avatar.text_refiner import Mlp
from talkingdit.nn import feed_forward as module
from talkingdit.nn.feed_forward import feed_forward
from talkingdit.nn.layers import GeluTanh

DIM, WIDE = 24, 40


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(5)
    layers = nn.Linear(DIM, WIDE), GeluTanh(), nn.Linear(WIDE, DIM)
    return nn.Sequential(*layers).to(dtype)


def tokens(batch: int = 1, count: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, count, DIM, generator=torch.Generator().manual_seed(6)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("batch", "count"), [(1, 20), (2, 10), (1, 7), (1, 0), (3, 1)])
def test_slices_have_the_bits_of_the_network_and_no_copies(
    batch: int, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FFN_TOKENS", 7)
    layers, y = network(dtype), tokens(batch, count, dtype)
    mlp = Mlp(DIM, WIDE, GeluTanh()).to(dtype)
    mlp.load_state_dict(dict(zip(mlp.state_dict(), layers.state_dict().values(), strict=True)))
    want = torch.cat([layers(part) for part in y.flatten(0, 1).split(7)]).view(y.shape)
    gelu = "aten::gelu_" if dtype == torch.float64 else "talkingdit::gelu_tanh_"
    for given, kind in ((layers, nn.Sequential), (mlp, Mlp)):
        own = y.clone()
        with Traffic() as traffic:
            got = feed_forward(given, own, kind=kind)
        assert got is own
        assert torch.equal(got, want)
        assert set(traffic.by_operator) == {"aten::addmm", gelu}
    own = y.clone()
    with Traffic() as traffic:
        got = feed_forward(layers, own, "epilogue")
    assert torch.equal(got, want)
    narrow = dtype in (torch.bfloat16, torch.float16)
    assert set(traffic.by_operator) == {"aten::addmm", "talkingdit::linear_gelu" if narrow else gelu}


class _Adapter(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _replace_forward(layer: nn.Module) -> None:
    """As accelerate and diffusers do."""
    own: Any = layer.forward
    layer.forward = lambda *given: own(*given) + 1  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "hook of the first layer": lambda net: net[0].register_forward_hook(lambda *given: given[2] + 1),
    "hook before the second layer": lambda net: net[2].register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
    "hook of the activation": lambda net: net[1].register_forward_hook(lambda *given: given[2] + 1),
    "hook of the network": lambda net: net.register_forward_hook(lambda *given: given[2] + 1),
    "other forward of the first layer": lambda net: _replace_forward(net[0]),
    "other forward of the network": lambda net: _replace_forward(net),
    "adapter": lambda net: setattr(net, "2", _Adapter(WIDE, DIM)),
    "parametrised weight": lambda net: parametrize.register_parametrization(net[0], "weight", _Doubled()),
    "GELU with erf": lambda net: setattr(net, "1", nn.GELU()),
    "no bias": lambda net: setattr(net, "2", nn.Linear(WIDE, DIM, bias=False)),
    "one more layer": lambda net: net.append(nn.Linear(DIM, DIM)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("count", [5, 20])
def test_what_stands_around_or_in_place_of_layers_is_called(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FFN_TOKENS", 7)
    net, y = network(), tokens(count=count)
    plain = net(y)
    CHANGES[name](net)
    want = net(y)
    assert not torch.allclose(want, plain)
    torch.testing.assert_close(feed_forward(net, y.clone()), want)


def test_gradients_reach_the_layers_and_the_input_is_kept() -> None:
    net, y = network(), tokens()
    given = y.clone().requires_grad_()
    feed_forward(net, given).sum().backward()
    assert torch.equal(given, y)
    assert all(p.grad is not None and p.grad.any() for p in (given, *net.parameters()))


@torch.no_grad()
def test_autocast_and_other_dtypes_go_through_the_layers() -> None:
    y = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(feed_forward(network(), y.clone()), network()(y))
    with pytest.raises(RuntimeError, match="dtype"):
        feed_forward(network(torch.bfloat16), y)


@torch.no_grad()
def test_rows_that_are_not_packed_are_not_written_elsewhere() -> None:
    """Part of a wider tensor: the rest of it stays as it is."""
    wider = torch.randn(1, 20, 2 * DIM)
    before, net = wider.clone(), network()
    want = net(wider[..., :DIM])
    torch.testing.assert_close(feed_forward(net, wider[..., :DIM]), want)
    assert torch.equal(wider[..., DIM:], before[..., DIM:])
