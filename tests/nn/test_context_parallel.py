# SPDX-License-Identifier: Apache-2.0
"""Attention of a sequence that several processes share, against one process in float64."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from distributed import Processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from talkingdit.nn.attention import attention
from talkingdit.nn.context_parallel import ContextParallel, gather, split

HEADS, DIM, TEXT = 8, 16, 7
LEAVES = ("q", "k", "v", "text_q", "text_k", "text_v")
LAYOUTS = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]  # ring x ulysses


class Case(NamedTuple):
    tokens: int
    joint: bool = False
    masked: bool = False
    segments: tuple[int, ...] | None = None
    mode: str = "gather"
    backend: str = "auto"
    dtype: torch.dtype = torch.float32
    checkpointed: bool = False


# A length that divides, ones that do not, and fewer tokens than ranks; cuts of samples beside those of the ranks.
SHAPES = [
    Case(64),
    Case(61),
    Case(61, joint=True),
    Case(37, masked=True),
    Case(37, joint=True, masked=True),
    Case(61, segments=(5, 6, 40, 61)),
    Case(61, masked=True, segments=(20, 61)),
    Case(5),
    Case(3),
    Case(3, joint=True),
    Case(3, segments=(1, 3)),
]
CASES = [case._replace(mode=mode) for case, mode in itertools.product(SHAPES, ("gather", "ring"))] + [
    Case(61, joint=True, masked=True, mode="ring", backend="math"),
    Case(61, joint=True, checkpointed=True),
    Case(61, segments=(5, 6, 40, 61), checkpointed=True, mode="ring"),
]


def data(case: Case) -> dict[str, Tensor]:
    """The same on every rank: whole q, k, v and text, and what the loss weighs outputs with."""
    generator = torch.Generator().manual_seed(case.tokens)

    def normal(length: int) -> Tensor:
        return torch.randn(2, length, HEADS, DIM, generator=generator, dtype=torch.float64).to(case.dtype)

    names = ["q", "k", "v", "weight"]
    tensors = {name: normal(case.tokens) for name in names}
    if case.joint:
        tensors |= {f"text_{name}": normal(TEXT) for name in names}
    if case.masked:
        mask = torch.rand(2, case.tokens + TEXT * case.joint, generator=generator) > 0.3
        mask[0, : case.tokens // 2 + 1] = False  # whole shards without a key
        mask[:, [end - 1 for end in case.segments or (0,)]] = True  # no sample without a key
        tensors["mask"] = mask
    return tensors


def expected(case: Case) -> dict[str, Tensor]:
    """Softmax attention and its gradients, written out, in float64."""
    x = {name: t.double() if t.is_floating_point() else t for name, t in data(case).items()}
    leaves = {name: x[name].requires_grad_() for name in LEAVES if name in x}
    q, k, v = (torch.cat([x[n], x[f"text_{n}"]], 1) if case.joint else x[n] for n in "qkv")
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * DIM**-0.5
    if case.masked:
        scores = scores.masked_fill(~x["mask"][:, None, None], -torch.inf)
    if case.segments:
        sample = torch.bucketize(torch.arange(case.tokens), torch.tensor(case.segments), right=True)
        scores = scores.masked_fill(sample[:, None] != sample, -torch.inf)
    out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)
    outs = {"out": out[:, : case.tokens], "text_out": out[:, case.tokens :]}
    loss = (outs["out"] * x["weight"]).sum()
    if case.joint:
        loss = loss + (outs["text_out"] * x["text_weight"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return outs | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def computed(case: Case, context: ContextParallel | None) -> dict[str, Tensor]:
    """The same through `attention`, every rank its shard; put together again, equal on all ranks."""
    x = data(case)
    leaves = {name: x[name].requires_grad_() for name in LEAVES if name in x}

    def run(*args: Tensor) -> Any:
        joint = args[3:] if case.joint else None
        return attention(
            *args[:3],
            mask=x.get("mask"),
            backend=case.backend,
            context=context,
            tokens=case.tokens,
            segments=case.segments,
            joint=joint,
        )

    args = [t if context is None or "text" in n else split(t, context, case.tokens) for n, t in leaves.items()]
    out = checkpoint(run, *args, use_reentrant=False) if case.checkpointed else run(*args)
    out, text_out = out if case.joint else (out, out[:, :0])
    # Every rank computes the loss of the whole; that of the text, which the ranks hold in copies, counts once together.
    whole = out if context is None else gather(out, context, case.tokens)
    loss = (whole * x["weight"]).sum()
    if case.joint:
        loss = loss + (text_out * x["text_weight"]).sum() / (1 if context is None else context.size)
    loss.backward()
    for leaf in leaves.values():
        if context is not None:
            dist.all_reduce(leaf.grad, group=context.group)
    return {"out": whole.detach(), "text_out": text_out.detach()} | {f"d{n}": t.grad for n, t in leaves.items()}


def make_context(layout: tuple[int, int], mode: str = "gather") -> ContextParallel:
    return ContextParallel.from_mesh(init_device_mesh("cpu", layout, mesh_dim_names=("ring", "ulysses")), mode)


def worst_errors(layout: tuple[int, int], cases: list[Case]) -> list[dict[str, float]]:
    contexts = {mode: make_context(layout, mode) for mode in ("gather", "ring")}
    errors = []
    for case in cases:
        got, want = computed(case, contexts[case.mode]), expected(case)
        assert got.keys() == want.keys()
        errors.append({n: (got[n] - want[n]).abs().max().item() for n in want if want[n].numel()})
    return errors


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "ring{}-ulysses{}".format(*layout))
def test_outputs_and_gradients_are_those_of_one_process(processes: Processes, layout: tuple[int, int]) -> None:
    for errors in processes(layout[0] * layout[1], worst_errors, layout, CASES):
        for case, error in zip(CASES, errors, strict=True):
            assert max(error.values()) < 4e-6, (case, error)


def rounding_errors(layout: tuple[int, int], case: Case) -> list[dict[str, float]]:
    """Relative errors of one process and of these."""
    want = expected(case)
    results = [computed(case, None), computed(case, make_context(layout, case.mode))]
    return [{n: ((got[n] - want[n]).norm() / want[n].norm()).item() for n in want} for got in results]


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_half_precision_rounds_no_more_than_in_one_process(processes: Processes, mode: str) -> None:
    """Sums over ranks are taken in float32. What a rank adds to dk, dv was rounded before in gather mode: root of 2."""
    case = Case(61, joint=True, mode=mode, dtype=torch.bfloat16)
    for one, four in processes(4, rounding_errors, (4, 1), case):
        for name in one:
            # The test adds the text's gradients of the ranks in bfloat16 itself.
            factor = 2 if name.startswith("dtext") else 1.5 if mode == "gather" else 1.1
            assert four[name] < factor * one[name], (name, one, four)


def naive_joint_error() -> float:
    """The text behind every rank's shard, as if it were more of the sequence: what `joint` is there to avoid."""
    case, context = Case(64, joint=True), make_context((1, 2))
    x = data(case)
    q, k, v = (torch.cat([split(x[n], context, 64), x[f"text_{n}"]], 1) for n in "qkv")
    out = attention(q, k, v, context=context, tokens=64 + 2 * TEXT)
    return (out[:, :32] - split(expected(case)["out"], context, 64)).abs().max().item()


def test_text_counted_once_per_rank_would_be_seen(processes: Processes) -> None:
    assert min(processes(2, naive_joint_error)) > 0.1


class CountSent(TorchDispatchMode):
    """Bytes that this rank sends to others."""

    sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "c10d::alltoall_base_":
            x, group, splits = args[1], dist.ProcessGroup.unbox(args[2]), args[4]
            rank, ranks = group.rank(), group.size()
            stays = splits[rank] / max(sum(splits), 1) if splits else 1 / ranks
            self.sent += round(x.nbytes * (1 - stays))
        elif name == "c10d::_allgather_base_":
            self.sent += args[1].nbytes * (dist.ProcessGroup.unbox(args[2]).size() - 1)
        elif name.startswith("c10d::"):
            raise AssertionError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


def bytes_sent(layout: tuple[int, int], mode: str) -> tuple[int, int]:
    context = make_context(layout, mode)
    q, k, v = (torch.randn(1, 16, HEADS, DIM, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with CountSent() as forward:
        out = attention(q, k, v, context=context, tokens=16 * context.size)
    with CountSent() as backward:
        out.sum().backward()
    return forward.sent, backward.sent


@pytest.mark.parametrize("mode", ["gather", "ring"])
@pytest.mark.parametrize("layout", [(1, 4), (2, 2), (4, 1)])
def test_no_more_is_sent_than_the_formula_says(processes: Processes, layout: tuple[int, int], mode: str) -> None:
    ring, ulysses = layout
    elements = 16 * 4 * HEADS * DIM
    there = 4 * elements / 4 * (ulysses - 1) / ulysses + 2 * elements / ulysses * (ring - 1) / ring
    back = 2 * there + (4 * 2 * elements / ulysses if mode == "ring" and ring > 1 else 0)
    assert processes(4, bytes_sent, layout, mode) == [(2 * there, back)] * 4


def messages() -> list[str]:
    """What wrong calls are told, in every rank: none of them may have begun to communicate."""
    context = make_context((1, 2))
    x, odd = torch.zeros(1, 4, 6, 8), torch.zeros(1, 4, 3, 8)
    calls = [
        lambda: attention(x, x, x, context=context),
        lambda: attention(x, x, x, context=context, tokens=9 + 2 * context.rank),
        lambda: attention(odd, odd, odd, context=context, tokens=8),
        lambda: attention(x, x, x, context=context, tokens=8, mask=torch.ones(1, 4, dtype=torch.bool)),
        lambda: attention(x, x, x, context=context, tokens=8, segments=[4, 9]),
        lambda: gather(x, context, 10),
        lambda: split(x, context, 8),
        lambda: ContextParallel(context.ulysses, None, context.group, "both"),
        lambda: ContextParallel(None, None, context.group),
        lambda: ContextParallel.from_mesh(init_device_mesh("cpu", (2,), mesh_dim_names=("ulysses",))),
    ]
    errors = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        errors.append(str(error.value))
    return errors


def test_wrong_calls_are_told_before_anything_is_sent(processes: Processes) -> None:
    first, second = processes(2, messages)
    assert first == [
        "attention: with context, tokens must be the length of the whole sequence, got None",
        "attention: q must have the 5 of 9 tokens that are the shard of rank 0 of 2, got 4",
        "attention: the number of heads must be divisible by the 2 ulysses ranks, got 3",
        "attention: mask must have the shape of the keys (1, 8), got (1, 4)",
        "attention: segments must be rising ends of samples, the last one the sequence's length 8, and q as long, "
        "got [4, 9] and 4 queries",
        "gather: x must have 5 tokens in dimension 1, got 4",
        "split: x must have 8 tokens in dimension 1, got 4",
        "ContextParallel: mode must be one of gather, ring, got 'both'",
        "ContextParallel: group must have ring x ulysses = 1 x 1 ranks, got 2",
        "ContextParallel: mesh must have the dimensions ('ring', 'ulysses'), got ('ulysses',)",
    ]
    assert second[1] == "attention: q must have the 5 of 11 tokens that are the shard of rank 1 of 2, got 4"


def compiled_equals_eager(mode: str) -> bool:
    context = make_context((2, 1), mode)

    def block(x: Tensor) -> Tensor:
        y = (x * 2).unflatten(2, (HEADS, DIM))
        return attention(y, y + 1, y - 1, context=context, tokens=9).flatten(2) * 3

    x = torch.randn(1, context.shard(9).size, HEADS * DIM, requires_grad=True)
    results = []
    for run in (block, torch.compile(block, backend="aot_eager")):
        out = run(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_a_compiled_block_computes_the_same(processes: Processes, mode: str) -> None:
    assert processes(2, compiled_equals_eager, mode) == [True, True]


@pytest.mark.parametrize(("tokens", "ranks"), [(64, 4), (61, 4), (3, 4), (0, 2)])
def test_shards_cover_the_sequence_evenly(tokens: int, ranks: int) -> None:
    class Group:
        def size(self) -> int:
            return ranks

    context = ContextParallel(None, Group(), Group())  # type: ignore[arg-type]
    shards = [context.shard(tokens, rank) for rank in range(ranks)]
    assert [shard.begin for shard in shards] + [tokens] == [0] + [shard.end for shard in shards]
    sizes = [shard.size for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
