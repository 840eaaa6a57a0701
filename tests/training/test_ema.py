# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from tiny_networks import backward, make_networks, sample_losses
from torch.distributed.tensor import DTensor

from training.ema import Ema
from training.parallel import shard, start
from training.sections import ParallelConfig


def change(networks, step):
    """What an optimiser does: new values in place."""
    with torch.no_grad():
        for i, parameter in enumerate(networks.parameters()):
            if parameter.requires_grad:
                parameter.mul_(1 + 0.01 * (i % 3)).add_(0.02 * step)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def by_formula(networks, decay, steps):
    average = [p.detach().double() for p in networks.parameters()]
    for step in range(steps):
        change(networks, step)
        keep = min(decay, (1 + step) / (10 + step))
        average = [
            keep * a + (1 - keep) * p.detach().double() for a, p in zip(average, networks.parameters(), strict=True)
        ]
    return average


def average(sharded):
    networks = make_networks()
    if sharded:
        config = ParallelConfig(precision="fp32")
        shard(networks, start(config, "cpu"), config)
    ema = Ema(networks, 0.3)
    for step in range(6):
        change(networks, step)
        ema.update(step)
    state = ema.state_dict()
    assert not sharded or all(isinstance(value, DTensor) for value in state.values())
    return {name: whole(value) for name, value in state.items()}


def test_averages_follow_the_formula_and_warm_up():
    networks = make_networks()
    want = by_formula(networks, 0.3, 6)
    got = average(False)
    assert list(got) == [n for n, _ in networks.named_parameters()]
    for value, wanted in zip(got.values(), want, strict=True):
        torch.testing.assert_close(value, wanted.float(), rtol=1e-5, atol=1e-6)


def test_sharded_averages_are_those_of_one_process(processes):
    want = average(False)
    for got in processes(2, average, True):
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)


def swap():
    """Losses before, with the averages, and after; where a forward before has left parameters gathered."""
    config = ParallelConfig(precision="fp32")
    networks = make_networks()
    mesh = start(config, "cpu")
    shard(networks, mesh, config)
    parameters = list(networks.parameters())
    ema = Ema(networks, 0.5)
    backward(networks, 0, mesh)
    change(networks, 3)
    kept = [p.to_local().clone() for p in parameters]

    def loss():
        with torch.no_grad():
            return sample_losses(networks, 0, [0, 1]).tolist()

    found = [loss()]
    with ema.swapped():
        found.append(loss())
    found.append(loss())

    def fail():
        with ema.swapped():
            loss()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    found.append(loss())
    assert all(torch.equal(p.to_local(), k) for p, k in zip(parameters, kept, strict=True))
    return found


def test_swapped_networks_have_the_averages_and_get_their_parameters_back(processes):
    now, averaged, after, after_error = processes(2, swap)[0]
    assert averaged == pytest.approx(sample_losses(make_networks(), 0, [0, 1]).tolist(), rel=1e-5)  # never updated
    assert now == after == after_error
    assert abs(now[0] - averaged[0]) > 1e-3


def test_bfloat16_parameters_come_back_exactly_and_the_average_keeps_its_precision():
    networks = make_networks().bfloat16()
    ema = Ema(networks, 0.9)
    change(networks, 1)
    ema.update(0)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    kept = [p.detach().clone() for p in networks.parameters()]
    with ema.swapped():
        for name, parameter in networks.named_parameters():
            assert torch.equal(parameter, state[name].bfloat16())
    assert all(torch.equal(p, k) for p, k in zip(networks.parameters(), kept, strict=True))
    for name, value in ema.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name])
    assert any(not torch.equal(value, value.bfloat16().float()) for value in state.values())


def test_frozen_parameters_have_no_average_unless_named():
    networks = make_networks()
    networks.transformer.requires_grad_(False)
    assert all(name.startswith("text_encoder.") for name in Ema(networks, 0.9).state_dict())
    names = ["transformer.head.head.weight", "text_encoder.position"]
    assert list(Ema(networks, 0.9, names=names).state_dict()) == names


def test_averages_are_loaded_back():
    networks = make_networks()
    ema = Ema(networks, 0.9, storage="cpu")
    change(networks, 1)
    other = Ema(networks, 0.9)
    assert not torch.equal(other.state_dict()["text_encoder.position"], ema.state_dict()["text_encoder.position"])
    other.load_state_dict(ema.state_dict())
    for name, value in ema.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    state = ema.state_dict()
    del state["text_encoder.position"]
    with pytest.raises(ValueError, match=r"differs in 'text_encoder\.position'"):
        other.load_state_dict(state)


def test_misuse_is_told():
    networks = make_networks()
    with pytest.raises(ValueError, match="decay must be at least 0 and less than 1, got 1"):
        Ema(networks, 1)
    with pytest.raises(ValueError, match="names must be those of parameters, got 'head'"):
        Ema(networks, 0.9, names=["head"])
    ema = Ema(networks, 0.9)
    with ema.swapped():
        with pytest.raises(RuntimeError, match="are in the networks already"), ema.swapped():
            pass
        with pytest.raises(RuntimeError, match="nothing to learn"):
            ema.update(0)
