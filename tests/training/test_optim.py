# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tiny_networks import backward, make_networks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from talkingdit.errors import UserError
from training import optim
from training.lora import add_adapters
from training.optim import LearningRate, Muon, build_optimizers, learning_rate_factor, newton_schulz
from training.parallel import shard, start
from training.sections import LoraConfig, OptimConfig, ParallelConfig

SHAPES = [(12, 20), (7, 5), (3, 8), (16, 16), (1, 6)]  # rows that two and four processes share unevenly


def matrices():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return values, [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(3)]


def steps(make, place):
    """Parameters after three steps on given gradients."""
    values, gradients = matrices()
    parameters = [nn.Parameter(place(value)) for value in values]
    optimizer = make(parameters)
    for given in gradients:
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = place(gradient)
        optimizer.step()
    return [p.detach() for p in parameters]


def muon_in_shards():
    """Larger matrices one for each process at a time, smaller ones together."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("shard",))
    with mock.patch.object(optim, "_TOGETHER", 150):
        found = steps(lambda p: Muon(p, lr=0.01), lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    return [p.full_tensor() for p in found]


@pytest.mark.parametrize("size", [2, 4])
def test_muon_on_shards_is_muon_on_whole_matrices(processes, size):
    for results in processes(size, muon_in_shards):
        for got, want in zip(results, steps(lambda p: Muon(p, lr=0.01), torch.clone), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_muon_is_that_of_torch_but_for_rounding():
    """torch iterates in bfloat16; ours, on a CPU that does not multiply it, in float32."""
    start_values, _ = matrices()
    ours = steps(lambda p: Muon(p, lr=0.01, weight_decay=0.1), torch.clone)
    options = {"lr": 0.01, "weight_decay": 0.1, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}
    theirs = steps(lambda p: torch.optim.Muon(p, **options), torch.clone)
    for got, want, before in zip(ours, theirs, start_values, strict=True):
        assert (got - want).norm() < 0.02 * (want - before).norm()


@pytest.mark.parametrize("shape", [(24, 24), (40, 10), (10, 40)])
@pytest.mark.parametrize(("bf16", "aside"), [(False, 1e-4), (True, 0.03)])
def test_newton_schulz_keeps_singular_vectors_and_evens_out_singular_values(shape, bf16, aside, monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bfloat16", lambda device: bf16)
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    together = newton_schulz(matrices, 5)
    each = torch.stack([newton_schulz(matrix, 5) for matrix in matrices])
    torch.testing.assert_close(together, each, rtol=0, atol=2 * torch.finfo(together.dtype).eps)
    u, values, v = torch.linalg.svd(matrices[0].double(), full_matrices=False)
    turned = u.T @ together[0].double() @ v.T
    torch.testing.assert_close(turned, torch.diag(turned.diagonal()), rtol=0, atol=aside)
    large = turned.diagonal()[values > 0.05 * values[0]]
    assert len(large) >= 9
    assert 0.6 < large.min() <= large.max() < 1.3


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match=r"must be matrices, got one of shape \[3\]"):
        Muon([nn.Parameter(torch.zeros(3))])


def names_of(networks, optimizer):
    names = {p: n for n, p in networks.named_parameters()}
    return {names[p] for group in optimizer.param_groups for p in group["params"]}


def test_muon_takes_the_matrices_of_blocks_and_injectors_and_nothing_frozen():
    networks = make_networks()
    networks.transformer.blocks[0].requires_grad_(False)
    adamw, muon = build_optimizers(networks, OptimConfig(name="muon"))
    inner = names_of(networks, muon)
    assert all(name.startswith(("transformer.blocks.1.", "transformer.audio_injector.injector.")) for name in inner)
    assert "transformer.blocks.1.ffn.0.weight" in inner
    assert "transformer.audio_injector.injector.0.q.weight" in inner
    others = names_of(networks, adamw)
    assert {"transformer.head.head.weight", "text_encoder.position", "transformer.blocks.1.ffn.0.bias"} <= others
    assert inner | others == {n for n, p in networks.named_parameters() if p.requires_grad}
    assert not inner & others


def test_learning_rates_of_some_parameters_are_scaled():
    networks = make_networks()
    config = OptimConfig(name="adamw", lr=1e-3, lr_scale={"audio_injector.*": 10.0, "*.bias": 0.5})
    (optimizer,) = build_optimizers(networks, config)
    names = {p: n for n, p in networks.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["transformer.audio_injector.injector.0.q.bias"] == pytest.approx(1e-2)  # the first pattern holds
    assert rates["transformer.blocks.0.ffn.0.bias"] == pytest.approx(5e-4)
    assert rates["transformer.blocks.0.ffn.0.weight"] == pytest.approx(1e-3)


def test_any_optimiser_goes_by_its_dotted_name():
    networks = make_networks()
    config = OptimConfig(name="torch.optim.SGD", lr=0.1, options={"momentum": 0.9}, weight_decay=0.02)
    (optimizer,) = build_optimizers(networks, config)
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.02)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "nothing"}, r"optim\.name: must be adamw, adamw8bit, muon or the dotted name .* got 'nothing'"),
        ({"name": "torch.optim.Nothing"}, r"got 'torch\.optim\.Nothing' \(module .* has no attribute"),
        ({"name": "torch.optim.SGD", "options": {"wings": 2}}, r"optim\.options: torch\.optim\.SGD does not take them"),
    ],
)
def test_an_optimiser_that_cannot_be_made_is_told(config, message):
    with pytest.raises(UserError, match=message):
        build_optimizers(make_networks(), OptimConfig(**config))


def test_training_nothing_is_told():
    with pytest.raises(UserError, match="no parameter of the networks requires a gradient"):
        build_optimizers(make_networks().requires_grad_(False), OptimConfig())


def test_8_bit_adamw_without_torchao_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"adamw8bit needs torchao, `pip install torchao`"):
        build_optimizers(make_networks(), OptimConfig(name="adamw8bit"))


def test_learning_rates_over_a_stage():
    config = OptimConfig(name="adamw", lr=0.5, warmup_steps=4, final=0.1, schedule="cosine")
    assert [learning_rate_factor(config, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate_factor(config, 100, 0.5) == pytest.approx(0.55)
    assert learning_rate_factor(config, 100, 1.0) == pytest.approx(0.1)
    config.schedule = "linear"
    assert learning_rate_factor(config, 100, 0.75) == pytest.approx(0.1 + 0.9 * 0.25)
    config.schedule = "constant"
    assert learning_rate_factor(config, 100, 0.75) == 1.0
    networks = make_networks()
    optimizers = build_optimizers(networks, config)
    rate = LearningRate(optimizers, config)
    optimizers[0].param_groups[0]["lr"] = 7.0  # as a checkpoint of a run with another configuration says
    assert rate.set(1, 0.0) == 0.5
    assert optimizers[0].param_groups[0]["lr"] == 0.25
    config.warmup_steps = 0
    assert learning_rate_factor(config, 0, 0.0) == 1.0


def resume(name):
    """Parameters after four steps, and after two, their states put into new optimisers, and two."""
    found = []
    for broken in (False, True):
        config = ParallelConfig(precision="fp32")
        mesh = start(config, "cpu")
        networks = make_networks()
        shard(networks, mesh, config)
        optim = OptimConfig(name=name, lr=1e-3, muon_lr=1e-3)
        optimizers = build_optimizers(networks, optim)
        rate = LearningRate(optimizers, optim)
        for step in range(4):
            if broken and step == 2:
                state = get_optimizer_state_dict(networks, optimizers)
                assert any(isinstance(value, DTensor) for entry in state["state"].values() for value in entry.values())
                optimizers = build_optimizers(networks, optim)
                rate = LearningRate(optimizers, optim)
                set_optimizer_state_dict(networks, optimizers, state)
            backward(networks, step, mesh)
            rate.set(step, step / 4)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found.append([p.full_tensor().detach() for p in networks.parameters()])
    return found


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_states_of_sharded_optimisers_go_through_distributed_checkpoints_dictionaries(processes, name):
    straight, broken = processes(2, resume, name)[0]
    assert all(torch.equal(a, b) for a, b in zip(straight, broken, strict=True))


def large_matrix(sharded):
    torch.manual_seed(0)
    value, gradients = torch.randn(64, 128), [torch.randn(64, 128) for _ in range(3)]
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)) if sharded else None

    def place(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)]) if sharded else tensor.clone()

    module = nn.Module()
    module.weight = nn.Parameter(place(value))
    (optimizer,) = build_optimizers(module, OptimConfig(name="adamw8bit", lr=0.01))
    rate = LearningRate([optimizer], OptimConfig(warmup_steps=0, schedule="constant"))
    for step, gradient in enumerate(gradients):
        module.weight.grad = place(gradient)
        rate.set(step, 0.0)
        optimizer.step()
    weight = module.weight.detach()
    kind = type(
        getattr(optimizer.state[module.weight]["exp_avg"], "_local_tensor", None)
        if sharded
        else optimizer.state[module.weight]["exp_avg"]
    )
    return (weight.full_tensor() if sharded else weight), kind.__name__


@pytest.mark.slow
def test_8_bit_adamw_on_shards_is_close_to_adamw(processes):
    """torchao compiles its step; moments of 4096 values and more are kept in 8 bits, blocks of 256 on a scale."""
    pytest.importorskip("torchao")
    got, kind = processes(2, large_matrix, True, timeout=240)[0]
    assert kind == "OptimState8bit"
    torch.manual_seed(0)
    weight, gradients = nn.Parameter(torch.randn(64, 128)), [torch.randn(64, 128) for _ in range(3)]
    before = weight.detach().clone()
    exact = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.98), weight_decay=0.01)
    for gradient in gradients:
        weight.grad = gradient
        exact.step()
    error = (got - weight.detach()).norm() / (weight.detach() - before).norm()
    assert 0 < error < 0.1
    assert math.isfinite(got.sum())


@pytest.mark.parametrize("name", ["adamw", "muon", "torch.optim.NAdam"])
def test_weight_decay_leaves_out_what_is_no_matrix(name):
    """One step with zero gradients moves exactly what decays."""
    networks = make_networks()
    config = OptimConfig(name=name, lr=0.1, muon_lr=0.1, weight_decay=0.5)
    if name == "torch.optim.NAdam":
        config.options = {"decoupled_weight_decay": True}
    for parameter in networks.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    before = {n: p.detach().clone() for n, p in networks.named_parameters()}
    for optimizer in build_optimizers(networks, config):
        optimizer.step()
    moved = {n for n, p in networks.named_parameters() if not torch.equal(p, before[n])}
    kept = before.keys() - moved
    assert {"transformer.blocks.0.ffn.0.weight", "transformer.patch_embedding.weight"} <= moved
    assert all(before[n].ndim > 1 for n in moved)
    spared = ("transformer.blocks.0.modulation", "transformer.head.modulation", "transformer.blocks.0.ffn.0.bias")
    assert {*spared, "transformer.blocks.0.self_attn.norm_q.weight", "text_encoder.position"} <= kept


def test_weight_decay_of_everything_is_an_option():
    networks = make_networks()
    for optimizer in build_optimizers(networks, OptimConfig(weight_decay=0.5, decay="all")):
        assert all(group["weight_decay"] == 0.5 for group in optimizer.param_groups)


def test_adapters_decay():
    networks = make_networks()
    add_adapters(networks.transformer, LoraConfig(rank=2))
    [optimizer] = build_optimizers(networks, OptimConfig(name="adamw", weight_decay=0.5))
    names = {p: n for n, p in networks.named_parameters()}
    decays = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {n for n in names.values() if ".lora_" in n} <= decays


ADAMW = {"lr": 0.01, "betas": (0.9, 0.98), "weight_decay": 0.1, "fused": True}


def adamw_in_shards():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    found = steps(lambda p: optim._AdamW(p, **ADAMW), lambda t: distribute_tensor(t, mesh, [Shard(0)]))
    return [p.full_tensor() for p in found]


def test_adamw_on_shards_is_that_of_torch_on_whole_tensors(processes):
    wanted = steps(lambda p: torch.optim.AdamW(p, **ADAMW), torch.clone)
    for results in processes(2, adamw_in_shards):
        for got, want in zip(results, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
