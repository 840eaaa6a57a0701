# SPDX-License-Identifier: Apache-2.0
"""One process's part of a training step on a cluster that is not there: what it sends, and what it holds.

The step is the real one: `training.parallel` cuts the model and makes the mesh, the model runs forward with its share
of the sequence, backward, and the optimisers and averages take their step. Only tensors have no storage (fake tensors)
and the process group has no wires (torch's "fake" backend), so a world of 512 is as easy as one of 8. Everything that
is counted was asked for by the program: each collective with its arguments, each storage with its life.

Two layers compute differently on CPUs, where fake tensors must live for FSDP's sake. They are made to do what they do
on GPUs, see `as_on_gpus`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from bench.ledger import Ledger, SentByRank, cluster
from talkingdit import families
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.model import WanS2VModel
from talkingdit.families.wan_s2v.rope import layout_at
from talkingdit.nn.layers import RMSNorm
from talkingdit.plan.clip import ClipShape
from training import parallel
from training.ema import Ema
from training.frozen import frozen_layers, narrow
from training.networks import Networks
from training.optim import build_optimizers
from training.sections import ModelConfig, OptimConfig, ParallelConfig
from training.stages import TRANSFORMER, plain_name


@dataclass
class Counted:
    """What rank 0 sent and held in one step.

    Attributes:
        sent: by kind and group.
        peak: bytes at the worst moment, by what they are: "parameters", "gradients", "optimiser", "averages",
            "gathered" (whole parameters and gradients of units, and what they travel in), "kept" (of the forward, for
            the backward), "working" (all else).
        moment: when that was: "forward", "backward" or "optimiser".
        held: bytes between steps, by the same names.
    """

    sent: list[SentByRank]
    peak: dict[str, int]
    moment: str
    held: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())


class _Norm(torch.autograd.Function):
    """RMS norm with what the fused CUDA kernel keeps: its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str) -> Tensor:
    """`talkingdit.nn.attention` without the float32 copies that it makes on CPUs, whose backward is faster so."""
    del backend
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _fused_norm(layer: RMSNorm, x: Tensor | None) -> Any:
    if x is None:
        return layer.weight.clone(), None
    return _Norm.apply(x, layer.weight.to(x.dtype))


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Tensors have no storage; attention and RMS norm keep and make what their CUDA kernels do."""
    layout_at.cache_clear()  # tables of rotations are kept between calls; fake ones must not be
    try:
        with (
            mock.patch("talkingdit.nn.local_attention.scaled_dot_product", _fused_attention),
            mock.patch.object(RMSNorm, "forward", _fused_norm),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        layout_at.cache_clear()


@dataclass(frozen=True)
class CountedStep:
    """What is counted.

    Args:
        config: of the model.
        clip: of every micro-batch.
        parallel, optim: of training/config.py.
        world, gpus: ranks, and how many of them are in a node.
        micro_batches: of this rank.
        averages: keep averages of the weights.
        trains: which parameters train, by name.
        prepare: changes the model before it is cut, such as adapters do.
        model: `frozen` and `swap` of it.
    """

    config: Mapping[str, Any]
    clip: ClipShape
    parallel: ParallelConfig
    world: int
    gpus: int = 8
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name="adamw"))
    micro_batches: int = 1
    averages: bool = True
    trains: Callable[[str], bool] = lambda name: True
    prepare: Callable[[WanS2VModel], Any] = lambda model: None
    model: ModelConfig = field(default_factory=ModelConfig)


def inputs(config: Mapping[str, Any], clip: ClipShape) -> dict[str, Tensor]:
    """Arguments of the model for a clip, with every condition that the clip has."""
    c, size = config, (clip.height // 8, clip.width // 8)
    given = {
        "latents": torch.empty(1, c["in_dim"], clip.latents, *size),
        "timestep": torch.empty(1),
        "text": torch.empty(1, c["text_len"], c["text_dim"]),
        "reference": torch.empty(1, c["in_dim"], 1, *size),
        "audio": torch.empty(1, c["audio_layers"], c["audio_dim"], 4 * clip.latents),
    }
    if clip.history:
        given["history"] = torch.empty(1, c["in_dim"], clip.history, *size)
    if clip.pose:
        given["pose"] = torch.empty(1, c["cond_dim"], clip.latents, *size)
    return given


def count(step: CountedStep) -> Counted:
    """Run the step, with optimisers that have their states already, and count."""
    with ExitStack() as stack:
        stack.enter_context(cluster(step.world))
        layout = parallel.start(step.parallel, "cpu")
        with torch.device("meta"):
            model = WanS2VModel(**step.config)
            step.prepare(model)
        trained = {f"{TRANSFORMER}{plain_name(name)}" for name, _ in model.named_parameters() if step.trains(name)}
        units = families.get("wan_s2v").units
        narrow(model, units, step.model, trained, torch.device("cpu"), step.parallel.offload)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(step.trains(name))
        stack.enter_context(as_on_gpus())
        networks = Networks(families.get("wan_s2v"), model)
        parallel.shard(networks, layout, step.parallel, narrow=step.model.frozen != "float32")
        for layer in frozen_layers(model).values():
            layer.fill(torch.empty(layer.out_features, layer.in_features))
        given = inputs(step.config, step.clip)
        optimizers = build_optimizers(networks, step.optim)
        ema = Ema(networks, 0.999) if step.averages else None
        for parameter in networks.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        # The first time optimisers make their states, and DTensor its plans, on tensors of whole size.
        _update(step, networks, optimizers, ema)
        for optimizer in optimizers:
            optimizer.zero_grad()

        ledger = Ledger(step.gpus)
        stack.enter_context(ledger)
        kinds = {ledger.number(_local(p)): "parameters" for p in networks.parameters()}
        kinds |= {ledger.number(t): "parameters" for layer in frozen_layers(model).values() for t in layer.stored()}
        for optimizer in optimizers:
            for value in tree_leaves([list(state.values()) for state in optimizer.state.values()]):
                if isinstance(value, Tensor):
                    kinds.update((ledger.number(part), "optimiser") for part in _parts(value))
        if ema is not None:
            kinds |= {ledger.number(_local(average)): "averages" for average in ema.state_dict().values()}
        for tensor in given.values():
            kinds[ledger.number(tensor)] = "kept"
        ledger.mark("begin")
        _train(step, networks, layout, given, optimizers, ema, ledger)
        kinds |= {ledger.number(_local(p.grad)): "gradients" for p in networks.parameters() if p.grad is not None}
        return _result(ledger, kinds)


def _train(
    step: CountedStep,
    networks: Networks,
    layout: parallel.ProcessMesh,
    given: Mapping[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    ema: Ema | None,
    ledger: Ledger,
) -> None:
    for i in range(step.micro_batches):
        parallel.last_micro_batch(networks, i + 1 == step.micro_batches)
        conditions = WanInputs(**{name: value for name, value in given.items() if name not in ("latents", "timestep")})
        velocity = networks.transformer(given["latents"], given["timestep"], conditions, context=layout.context)
        loss = (velocity - given["latents"]).square().mean()
        del velocity
        ledger.mark(f"backward {i}")
        loss.backward()
        del loss
        ledger.mark(f"forward {i + 1}")
    ledger.mark("optimiser")
    _update(step, networks, optimizers, ema)
    ledger.mark("end")


def _update(step: CountedStep, networks: Networks, optimizers: list[torch.optim.Optimizer], ema: Ema | None) -> None:
    with mock.patch.object(Tensor, "item", return_value=1.0):  # the norm, which fake tensors do not know
        parallel.clip_gradients(networks, step.optim.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    if ema is not None:
        ema.update(0)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: shards of DTensors, codes and scales of quantised ones."""
    if isinstance(tensor, DTensor):
        yield from _parts(tensor.to_local())
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
    else:
        yield tensor


def _result(ledger: Ledger, kinds: Mapping[int, str]) -> Counted:
    begin, forwards = ledger.marks["begin"], sorted(v for k, v in ledger.marks.items() if k.startswith("backward"))
    live: dict[int, int] = defaultdict(int)
    kept: set[int] = set()  # what the last forward left
    best, total, at = -1, 0, 0
    for i, (_, change) in enumerate(ledger.events):
        total += change
        if i >= begin and total > best:
            best, at = total, i
    snapshot: dict[int, int] = {}
    held: dict[int, int] = {}
    since = max((moment for moment in forwards if moment <= at), default=math.inf)
    for i, (number, change) in enumerate(ledger.events):
        if i == begin:
            held = dict(live)
        if i == since:
            kept = {n for n, size in live.items() if size}
        live[number] += change
        if i == at:
            snapshot = dict(live)

    def named(sizes: Mapping[int, int]) -> dict[str, int]:
        found: dict[str, int] = defaultdict(int)
        for number, size in sizes.items():
            name = kinds.get(number)
            if name is None:
                name = "gathered" if number in ledger.whole else "kept" if number in kept else "working"
            found[name] += size
        return {name: size for name, size in found.items() if size}

    moment = max((mark, name) for name, mark in ledger.marks.items() if mark <= at)[1].split()[0]
    return Counted(list(ledger.sent.values()), named(snapshot), moment.replace("begin", "forward"), named(held))
