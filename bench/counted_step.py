# SPDX-License-Identifier: Apache-2.0
"""One process's part of a training step on a cluster that is not there: what it sends, and what it holds.

The step is the real one: `training.parallel` cuts the model and makes the mesh, the model runs forward with its share
of the sequence, backward, and the optimisers and averages take their step. Only tensors have no storage (fake tensors)
and the process group has no wires (torch's "fake" backend), so a world of 512 is as easy as one of 8. Everything that
is counted was asked for by the program: each collective with its arguments, each storage with its life.

Fake tensors must be a CPU's for FSDP's sake, so the card is `CARD`, another CPU than the host: what goes from one to
the other is copied, what meets from both is refused, as with a GPU. Some layers compute differently on CPUs. They are
made to do what they do on GPUs, see `as_on_gpus`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
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
from training.float8 import _recipe as _float8_recipe
from training.float8 import use_float8
from training.frozen import frozen_layers, narrow
from training.networks import Networks
from training.optim import build_optimizers
from training.sections import ModelConfig, OptimConfig, ParallelConfig
from training.stages import TRANSFORMER, plain_name

CARD = torch.device("cpu", 0)  # of fake tensors alone: those with storage forget the number


@dataclass
class Counted:
    """What rank 0 sent and held in one step.

    Attributes:
        sent: by kind and group.
        peak: bytes on the card at its worst moment, by what they are: "parameters", "gradients", "optimiser",
            "averages", "gathered" (whole parameters and gradients of units, and what they travel in), "kept" (of the
            forward, for the backward), "working" (all else).
        moment: when that was: "forward", "backward" or "optimiser".
        held: bytes on the card between steps, by the same names.
        host: bytes on the host at its own worst moment, by the same names.
    """

    sent: list[SentByRank]
    peak: dict[str, int]
    moment: str
    held: dict[str, int]
    host: dict[str, int]

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


def _recipe_of_gpus(kind: str, emulate: bool) -> Any:
    """Of `training.float8`, whose products are not emulated with wide copies."""
    del emulate
    return _float8_recipe(kind, emulate=False)


_plain_tensor = torch.tensor


def _tensor(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which forgets the number of `CARD`."""
    made = _plain_tensor(*arguments, **options)
    return made if device is None else made.to(device)


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Tensors have no storage; attention, RMS norm and products in float8 keep and make what their CUDA kernels do."""
    layout_at.cache_clear()  # tables of rotations are kept between calls; fake ones must not be
    try:
        with (
            mock.patch("torch.distributed.fsdp._fully_shard._fully_shard._get_device_from_mesh", return_value=CARD),
            mock.patch("talkingdit.nn.local_attention.scaled_dot_product", _fused_attention),
            mock.patch.object(RMSNorm, "forward", _fused_norm),
            mock.patch("training.float8._recipe", _recipe_of_gpus),
            mock.patch("torch.tensor", _tensor),
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


def inputs(config: Mapping[str, Any], clip: ClipShape, card: torch.device) -> dict[str, Tensor]:
    """Arguments of the model for a clip, with every condition that the clip has."""
    c, size = config, (clip.height // 8, clip.width // 8)
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, c["in_dim"], clip.latents, *size),
        "timestep": (1,),
        "text": (1, c["text_len"], c["text_dim"]),
        "reference": (1, c["in_dim"], 1, *size),
        "audio": (1, c["audio_layers"], c["audio_dim"], 4 * clip.latents),
    }
    if clip.history:
        shapes["history"] = (1, c["in_dim"], clip.history, *size)
    if clip.pose:
        shapes["pose"] = (1, c["cond_dim"], clip.latents, *size)
    return {name: torch.rand(shape, device=card) for name, shape in shapes.items()}


@contextmanager
def as_on_the_host() -> Iterator[None]:
    """Tensors have no storage, and the processor is all that there is: what `count` is compared with where it runs."""
    layout_at.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        layout_at.cache_clear()


def count(
    step: CountedStep, card: torch.device = CARD, world: Callable[[], AbstractContextManager[Any]] = as_on_gpus
) -> Counted:
    """Run the step, with optimisers that have their states already, and count.

    Args:
        card: where the model is; `HOST` for a step of a processor.
        world: within which tensors are made.
    """
    with ExitStack() as stack:
        stack.enter_context(cluster(step.world))
        layout = replace(parallel.start(step.parallel, "cpu"), device=card)
        with torch.device("meta"):
            model = WanS2VModel(**step.config)
            step.prepare(model)
        trained = {f"{TRANSFORMER}{plain_name(name)}" for name, _ in model.named_parameters() if step.trains(name)}
        units = families.get("wan_s2v").units
        narrow(model, units, step.model, trained, card, step.parallel.offload)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(step.trains(name))
        if step.optim.name == "adamw8bit":
            _make_tables()
        stack.enter_context(world())
        networks = Networks(families.get("wan_s2v"), model)
        use_float8(networks, step.parallel, card)
        parallel.shard(networks, layout, step.parallel, narrow=step.model.frozen != "float32")
        for layer in frozen_layers(model).values():
            layer.fill(torch.rand(layer.out_features, layer.in_features, device=card))
        for parameter in networks.parameters():
            nn.init.normal_(_local(parameter), std=0.02)
        given = inputs(step.config, step.clip, card)
        optimizers = build_optimizers(networks, step.optim)
        ema = Ema(networks, 0.999) if step.averages else None
        for parameter in networks.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        # The first time optimisers make their states, and DTensor its plans, on tensors of whole size.
        _update(step, networks, optimizers, ema)
        for optimizer in optimizers:
            optimizer.zero_grad()

        ledger = Ledger(step.gpus, card)
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


def _make_tables() -> None:
    """torchao's, of what eight bits mean: it makes them once, from numbers, which fake tensors do not have."""
    from torchao.optim.subclass_8bit import OptimState8bit

    for signed in (True, False):
        OptimState8bit.zeros((256,), signed)


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
    fake = any(is_fake(_local(parameter)) for parameter in networks.parameters())
    with mock.patch.object(Tensor, "item", return_value=1.0) if fake else nullcontext():  # they do not know the norm
        parallel.clip_gradients(networks, step.optim.clip_norm)
    with mock.patch("torch.compile", lambda function, **options: function):  # torchao does; one parameter after another
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
    begin, forwards = ledger.marks["begin"], [v for k, v in ledger.marks.items() if k.startswith("backward")]

    def alive(on_host: bool, at: int) -> dict[str, int]:
        """Bytes by name, of what is there after so many events."""
        live, kept = _live(ledger, at), set[int]()
        if before := [moment for moment in forwards if moment < at]:
            kept = {number for number, size in _live(ledger, max(before)).items() if size}  # what that forward left
        found: dict[str, int] = defaultdict(int)
        for number, size in live.items():
            if (number in ledger.host) != on_host:
                continue
            name = kinds.get(number)
            if name is None:
                name = "gathered" if number in ledger.whole else "kept" if number in kept else "working"
            found[name] += size
        return {name: size for name, size in found.items() if size}

    worst = _worst(ledger, begin, on_host=False)
    moment = max((mark, name) for name, mark in ledger.marks.items() if mark < worst)[1].split()[0]
    return Counted(
        list(ledger.sent.values()),
        peak=alive(False, worst),
        moment=moment.replace("begin", "forward"),
        held=alive(False, begin),
        host=alive(True, _worst(ledger, begin, on_host=True)),
    )


def _worst(ledger: Ledger, begin: int, on_host: bool) -> int:
    """Events until most bytes are on the host, or on the card, at once."""
    total, best, at = 0, -1, begin
    for i, (number, change) in enumerate(ledger.events, 1):
        total += change if (number in ledger.host) == on_host else 0
        if i > begin and total > best:
            best, at = total, i
    return at


def _live(ledger: Ledger, events: int) -> dict[int, int]:
    """Bytes of every storage after so many events."""
    live: dict[int, int] = defaultdict(int)
    for number, change in ledger.events[:events]:
        live[number] += change
    return live
