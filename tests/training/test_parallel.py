# SPDX-License-Identifier: Apache-2.0
"""Sharded training is the training of one process: losses, gradients and weights agree, whatever the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_networks import backward, make_networks, sample_losses
from torch.distributed.tensor import DTensor

from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.conditions import WanInputs
from training import optim, parallel
from training.config import Config
from training.loop import Trainer
from training.optim import build_optimizers
from training.parallel import (
    clip_gradients,
    computes_in,
    last_micro_batch,
    load_weights,
    shard,
    start,
    stop,
    trainable_changed,
)
from training.sections import OptimConfig, ParallelConfig

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")

STEPS = 20
ADAMW = {"name": "adamw", "lr": 1e-3}
MUON = {"name": "muon", "lr": 1e-3, "muon_lr": 1e-3}


def sharded(networks, precision="fp32", **parallel):
    config = ParallelConfig(precision=precision, **parallel)
    mesh = start(config, "cpu")
    shard(networks, mesh, config)
    return mesh


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@dataclass(frozen=True)
class Case:
    parallel: dict[str, Any]
    optim: dict[str, Any]
    pieces: int = 1  # micro-batches of a process
    packed: bool = False
    frozen: tuple[str, ...] = ()  # parts of names


def train(networks, case, mesh=None, steps=STEPS):
    """Loss and gradient norm of every step, gradients of the first, parameters after the last."""
    optimizers = build_optimizers(networks, OptimConfig(**case.optim))
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        losses.append(backward(networks, step, mesh, *(() if mesh is None else (case.pieces, case.packed))))
        if step == 0:
            gradients = {n: whole(p.grad) for n, p in networks.named_parameters() if p.grad is not None}
        norms.append(clip_gradients(networks, 0.5))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses, norms, gradients, {n: whole(p) for n, p in networks.named_parameters()}


def freeze(networks, parts):
    for name, parameter in networks.named_parameters():
        if any(part in name for part in parts):
            parameter.requires_grad_(False)


# Muon's roundings to bfloat16 would grow from step to step.
in_float32 = mock.patch.object(optim, "multiplies_bfloat16", return_value=False)


def train_in_layouts(cases):
    results = []
    for case in cases:
        networks = make_networks()
        freeze(networks, case.frozen)
        with in_float32:
            results.append(train(networks, case, sharded(networks, **case.parallel)))
    return results if dist.get_rank() == 0 else None


FULL, SELECTIVE = {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}
FROZEN = ("ffn", "blocks.1.", "head.", "text_encoder")
CASES = {
    "FSDP": (2, [Case({}, ADAMW), Case(FULL, ADAMW, pieces=2, frozen=FROZEN), Case(SELECTIVE, MUON, packed=True)]),
    "CP": (2, [Case({"ulysses": 2}, ADAMW), Case({"ring": 2, "offload": True} | FULL, ADAMW, packed=True)]),
    "replicas": (2, [Case({"replicate": 2} | FULL, MUON), Case({"replicate": 0, "shard": 1}, ADAMW, frozen=FROZEN)]),
    "HSDP": (4, [Case(SELECTIVE, ADAMW), Case({"replicate": 2} | FULL, MUON)]),
    "CP x CP": (4, [Case({"ulysses": 2, "ring": 2} | SELECTIVE, ADAMW), Case({"ulysses": 2} | FULL, MUON, pieces=2)]),
    "HSDP x CP": (4, [Case({"replicate": 2, "ring": 2, "ring_mode": "ring"}, ADAMW, frozen=FROZEN)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_every_layout_trains_as_one_process(processes, alone_results, kind):
    size, cases = CASES[kind]
    for case, got in zip(cases, processes(size, train_in_layouts, cases, timeout=240)[0], strict=True):
        want = alone_results(case)
        for name, values, wanted in zip(("losses", "norms"), got, want, strict=False):
            assert values == pytest.approx(wanted, rel=1e-5), (case, name)
        for name, values, wanted in zip(("gradients", "parameters"), got[2:], want[2:], strict=True):
            assert values.keys() == wanted.keys()
            largest = max(tensor.abs().max() for tensor in wanted.values())
            worst = max((values[n] - wanted[n]).abs().max() for n in wanted) / largest
            assert worst < 1e-5, (case, name, worst)


@pytest.fixture(scope="module")
def alone_results():
    """What one process comes to without any sharding: its results by what trains and the optimiser."""
    known = {}

    def find(case):
        key = case.frozen, case.optim["name"]
        if key not in known:
            networks = make_networks()
            freeze(networks, case.frozen)
            with in_float32:
                known[key] = train(networks, case)
        return known[key]

    return find


def dtypes_where_one_is_slow(slow):
    """What layers get in a run that chooses its dtype, and what it is said to compute in."""
    seen = []
    with mock.patch.object(parallel, "multiplies_bfloat16", return_value=dist.get_rank() != slow):
        networks = make_networks()
        mesh = sharded(networks, precision="auto", shard=2)
        layer = networks.transformer.blocks[0].ffn[0]
        layer.register_forward_pre_hook(lambda module, given: seen.extend([given[0].dtype, module.weight.dtype]))
        backward(networks, 0, mesh)
        return seen, computes_in("auto", mesh)


@pytest.mark.parametrize(("slow", "expected"), [(None, torch.bfloat16), (1, torch.float32)])
def test_a_run_that_chooses_computes_in_what_is_fast_for_all(processes, slow, expected):
    """Processes that computed in different dtypes would send each other what they cannot read."""
    for seen, dtype in processes(2, dtypes_where_one_is_slow, slow):
        assert set(seen) == {expected}
        assert dtype == expected


@pytest.mark.parametrize(
    ("precision", "fast", "expected"),
    [
        ("auto", True, ""),
        ("auto", False, "computes in float32, which is faster"),
        ("bf16", True, ""),
        ("bf16", False, 'parallel.precision = "auto" takes float32, which is several times faster here'),
        ("fp32", False, ""),
    ],
)
def test_a_dtype_that_is_slow_or_unexpected_is_said(precision, fast, expected, capsys):
    trainer = object.__new__(Trainer)
    trainer.config, trainer.mesh = Config(), start(ParallelConfig(), "cpu")
    trainer.config.parallel.precision = precision
    with mock.patch.object(parallel, "multiplies_bfloat16", return_value=fast):
        trainer.say_dtype()
    said = capsys.readouterr().out
    assert expected in said
    assert bool(expected) == bool(said)


def two_micro_batches():
    """Gradients of replicas that talk for every micro-batch, and of those that do for the last one only."""
    found = []
    for say in (False, True):
        networks = make_networks()
        mesh = sharded(networks, replicate=2)
        for step in range(2):
            if say:
                last_micro_batch(networks, step == 1)
            sample_losses(networks, step, [mesh.data_rank, mesh.data_rank + 2]).sum().backward()
        found.append({n: whole(p.grad) for n, p in networks.named_parameters()})
    return found


def test_replicas_that_wait_for_the_last_micro_batch_come_to_the_same_gradients(processes):
    always, last = processes(2, two_micro_batches)[0]
    for name, gradient in always.items():
        torch.testing.assert_close(last[name], gradient, rtol=1e-5, atol=1e-6)


def look_inside():
    """What units are while the head runs, in bfloat16: dtypes, and which of them are gathered."""
    networks = make_networks()
    total = sum(p.numel() for p in networks.parameters())
    sharded(networks, "bf16")
    held = sum(p.to_local().numel() for p in networks.parameters())
    model = networks.transformer
    seen = {}

    def look(module, arguments):
        seen["residual"] = arguments[0].dtype
        seen["gathered"] = {n for n, p in networks.named_parameters() if not isinstance(p, DTensor)}
        seen["head"] = module.head.weight.dtype

    model.head.register_forward_pre_hook(look)
    for name in ("time_projection.1", "casual_audio_encoder.encoder.conv2", "blocks.1.ffn.0"):
        model.get_submodule(name).register_forward_hook(
            lambda module, given, result, name=name: seen.__setitem__(
                name, (next(module.parameters()).dtype, given[0].dtype, result.dtype)
            )
        )
    losses = sample_losses(networks, 0, [0, 1, 2, 3])
    losses.sum().backward()
    seen["gradients"] = {p.grad.dtype for p in networks.parameters()}
    seen["after"] = [n for n, p in networks.named_parameters() if not isinstance(p, DTensor)]
    return total, held, losses.detach(), seen


def test_bfloat16_spares_the_float32_layers_and_gathers_one_unit_at_a_time(processes):
    (total, held, losses, seen), (_, other, _, _) = processes(2, look_inside)
    assert abs(held - total / 2) < 0.02 * total  # rows that do not divide by two
    assert held + other == total
    single, short = torch.float32, torch.bfloat16
    assert seen["residual"] == seen["head"] == single
    assert seen["time_projection.1"] == seen["casual_audio_encoder.encoder.conv2"] == (single, single, single)
    assert seen["blocks.1.ffn.0"] == (short, short, short)
    assert seen["gradients"] == {single}
    # The head itself, and the small parameters of the roots.
    roots = ("patch_embedding", "trainable_cond_mask", "frame_packer", "head.")
    assert seen["gathered"]
    assert all(
        n.startswith("text_encoder.") or n.startswith(tuple("transformer." + r for r in roots))
        for n in seen["gathered"]
    )
    assert seen["after"] == []
    exact = sample_losses(make_networks(), 0, [0, 1, 2, 3]).detach()
    assert 0 < (losses - exact).abs().max() < 0.01 * exact.max()


def denoise(sharded_over_processes):
    """A step of generation, whose conditions are made beforehand."""
    networks = make_networks()
    if sharded_over_processes:
        sharded(networks, ulysses=2)
    generator = torch.Generator().manual_seed(0)
    latents, audio = torch.randn(1, 16, 3, 6, 8, generator=generator), torch.randn(1, 2, 160, 12, generator=generator)
    with torch.no_grad():
        text = networks.text_encoder.encode(["a man"]).features
        conditions = networks.transformer.encode_conditions(WanInputs(text, reference=latents[:, :, :1], audio=audio))
        return networks.transformer(latents, torch.tensor([500.0]), conditions=conditions)


def test_sharded_networks_generate_for_validation(processes):
    for velocity in processes(2, denoise, True):
        torch.testing.assert_close(velocity, denoise(False), rtol=1e-5, atol=1e-5)


def adapted():
    networks = make_networks()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        networks.transformer.add_adapter(
            LoraConfig(r=2, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"], init_lora_weights="gaussian")
        )
    return networks


def train_adapters():
    networks = adapted()
    mesh = sharded(networks, activation_checkpointing="full")
    return train(networks, Case({}, ADAMW), mesh, steps=3)


def test_adapters_train_as_in_one_process(processes):
    losses, norms, gradients, parameters = processes(2, train_adapters)[0]
    alone = train(adapted(), Case({}, ADAMW), steps=3)
    assert losses == pytest.approx(alone[0], rel=1e-5)
    assert norms == pytest.approx(alone[1], rel=1e-5)
    assert all(".lora_" in name or name.startswith("text_encoder.") for name in gradients)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, alone[3][name], rtol=1e-5, atol=1e-6)


def change_what_trains():
    networks = make_networks()
    freeze(networks, [".blocks."])
    mesh = sharded(networks, "bf16")
    backward(networks, 0, mesh)
    frozen = {n for n, p in networks.named_parameters() if p.grad is None}
    networks.requires_grad_(True)
    trainable_changed(networks)
    backward(networks, 1, mesh)
    return frozen, {n: p.grad.dtype for n, p in networks.named_parameters() if p.grad is not None}


def test_a_stage_may_unfreeze_what_the_one_before_froze(processes):
    frozen, dtypes = processes(2, change_what_trains)[0]
    names = {n for n, _ in make_networks().named_parameters()}
    assert frozen == {n for n in names if ".blocks." in n}
    assert dtypes == dict.fromkeys(names, torch.float32)


def load_in_shards(folder):
    """Networks built without memory and filled from the folder, and networks with adapters."""
    loaded = []
    for adapters in (False, True):
        with torch.device("meta"):
            networks = make_networks(dim=64)
        if adapters:
            networks.transformer.add_adapter(LoraConfig(r=2, target_modules=["q"]))
            for name, module in networks.transformer.named_modules():
                if ".lora_" in name and isinstance(module, torch.nn.Linear):
                    torch.nn.init.constant_(module.to_empty(device="cpu").weight, 0.5)
        sharded(networks, "bf16")
        load_weights(networks, folder)
        loaded.append({n: whole(p) for n, p in networks.named_parameters()})
    return loaded


def save(networks, folder):
    networks.transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    networks.text_encoder.save_pretrained(folder / "text_encoder")


def test_a_checkpoint_is_read_into_shards_and_adapters_stay(processes, tmp_path):
    networks = make_networks(seed=3, dim=64)
    save(networks, tmp_path)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    plain, with_adapters = processes(2, load_in_shards, tmp_path)[1]
    for name, parameter in networks.named_parameters():
        assert torch.equal(plain[name], parameter), name
    for name, parameter in with_adapters.items():
        known = dict(networks.named_parameters()).get(name.replace(".base_layer.", "."))
        assert torch.equal(parameter, torch.full_like(parameter, 0.5) if known is None else known), name
    assert sum(".lora_A." in name for name in with_adapters) == 2 * 3


@pytest.fixture
def alone():
    """A world of one process, as a run without torchrun has it."""
    yield
    stop()
    assert not dist.is_initialized()


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_gradients_are_clipped_as_torch_clips_them(alone, max_norm):
    """Whether they are tensors or, cut into one piece each, DTensors."""

    def clipped(clip, cut):
        networks = make_networks()
        backward(networks, 0, *((sharded(networks),) if cut else ()))
        norm = clip(networks)
        return norm, [whole(p.grad) for p in networks.parameters() if p.grad is not None]

    want, gradients = clipped(lambda n: float(torch.nn.utils.clip_grad_norm_(n.parameters(), max_norm)), False)
    for cut in (False, True):
        norm, got = clipped(lambda n: clip_gradients(n, max_norm), cut)
        assert norm == pytest.approx(want, rel=1e-6)
        for a, b in zip(got, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_process_on_its_own_needs_no_torchrun(alone):
    networks = make_networks()
    mesh = sharded(networks)
    assert (mesh.world, mesh.data_rank, mesh.data_size, mesh.context) == (1, 0, 1, None)
    got, want = backward(networks, 0, mesh), backward(make_networks(), 0)
    assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients(alone):
    networks, plain = (
        make_networks(num_layers=1, audio_inject_layers=(0,)),
        make_networks(num_layers=1, audio_inject_layers=(0,)),
    )
    mesh = sharded(networks, compile=True, activation_checkpointing="full")
    assert backward(networks, 0, mesh) == pytest.approx(backward(plain, 0), rel=1e-5)
    want = {n: p.grad for n, p in plain.named_parameters()}
    largest = max(gradient.abs().max() for gradient in want.values())
    assert max((whole(p.grad) - want[n]).abs().max() for n, p in networks.named_parameters()) < 1e-5 * largest


def test_a_checkpoint_that_does_not_fit_is_told(alone, tmp_path):
    save(make_networks(), tmp_path)
    file = tmp_path / "transformer" / "weights.safetensors"
    tensors = {}
    for part in (tmp_path / "transformer").glob("*.safetensors*"):
        tensors |= load_file(part) if part.suffix == ".safetensors" else {}
        part.unlink()
    del tensors["blocks.0.ffn.0.weight"]
    save_file(tensors, file)
    networks = make_networks()
    sharded(networks)
    with pytest.raises(UserError, match=r"lacks 1 of \d+ weights: blocks\.0\.ffn\.0\.weight"):
        load_weights(networks, tmp_path)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"replicate": 2}, r"replicate 2 x shard 1 x ring 1 x ulysses 1 must be the number of processes, 1, .* got 2"),
        ({"shard": 3}, r"replicate 1 x shard 3 x ring 1 x ulysses 1 must be the number of processes, 1"),
        ({"replicate": 0}, r"parallel\.replicate, parallel\.shard: one of them may be 0, .* got both"),
        ({"replicate": 0, "shard": 3}, r"replicate 1 x shard 3 x ring 1 x ulysses 1 must be .*, 1, .* got 3"),
        ({"ring": 0}, r"parallel\.ring: must be at least 1, got 0"),
        ({"shard": -1}, r"parallel\.shard: must be at least 0, got -1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_processes_is_told(parallel, message):
    with pytest.raises(UserError, match=message):
        start(ParallelConfig(**parallel), "cpu")
    assert not dist.is_initialized()


def test_a_device_that_is_not_there_is_told(monkeypatch):
    with pytest.raises(UserError, match="must be 'auto', 'cpu' or 'cuda', got 'tpu'"):
        start(ParallelConfig(), "tpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 3 of this machine needs a GPU of its own and there are 2"):
        start(ParallelConfig(), "cuda")
    assert not dist.is_initialized()
