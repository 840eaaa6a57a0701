# SPDX-License-Identifier: Apache-2.0
"""Audio attention on tensor cores, without a GPU: every size class of its kernels, run thread by thread in three orders
between pages that trap. Results must be closer to float64 than twice a softmax in float32 that is rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_device import Device
from torch import Tensor

from talkingdit import ops

HALVES = [torch.bfloat16, torch.float16]


def inputs(
    dtype: torch.dtype, dim: int, audio: int, per_frame: int, frames: int = 2, heads: int = 2, batch: int = 1,
    speakers: int = 0, tokens: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    torch.manual_seed(dim + audio)
    count = tokens or frames * per_frame
    people = (speakers,) if speakers else ()
    made = {"q": torch.randn(batch, count, heads, dim).to(dtype)}
    for name in ("k", "v"):
        made[name] = torch.randn(batch, *people, frames, audio, heads, dim).to(dtype)
    if speakers:
        made["weights"] = torch.rand(batch, speakers, count)
    return made


def gradients(function: Any, tensors: dict[str, Tensor], grad: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves, **options)
    return dict(zip(["out", *leaves], [out, *torch.autograd.grad(out, list(leaves.values()), grad)], strict=True))


def check(device: Device, tensors: dict[str, Tensor], place: Any = None, **options: Any) -> dict[str, Tensor]:
    """Results and gradients against float64; what the kernels returned."""
    place = place or device.put
    grad = torch.randn(tensors["q"].shape, generator=torch.Generator().manual_seed(1)).to(tensors["q"].dtype)
    names = ["out", *tensors]

    def run() -> list[Tensor]:
        placed = {name: place(x) for name, x in tensors.items()}
        return list(gradients(ops.audio_attention, placed, place(grad), options).values())

    ours = dict(zip(names, device.orders(run), strict=True))
    plain = gradients(ops.audio_attention_reference, {n: x.clone() for n, x in tensors.items()}, grad, options)
    truth = gradients(
        ops.audio_attention_reference, {n: x.double() for n, x in tensors.items()}, grad.double(), options
    )
    for name in names:
        assert ours[name].isfinite().all(), f"{name} was not written everywhere"
        error, allowed = ((x[name].double() - truth[name]).norm() for x in (ours, plain))
        floor = 1e-6 * truth[name].norm()  # gradients of weights are float32
        assert error <= 2 * allowed + floor, f"{name}: {error:.3g} against {allowed:.3g}"
    return ours


@pytest.mark.parametrize("audio", [1, 5, 8, 13, 32, 40, 64])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_every_size_class(device: Device, dim: int, audio: int) -> None:
    dtype = HALVES[(audio + dim // 32) % 2]
    check(device, inputs(dtype, dim, audio, per_frame=19, heads=3), tokens_per_frame=19)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_windows_lengths_clips_and_a_shard_that_cuts_frames(device: Device, dtype: torch.dtype) -> None:
    tensors = inputs(dtype, 64, 7, per_frame=33, frames=4, batch=2, tokens=70)
    lens = torch.tensor([[7, 0, 3, 7], [0, 0, 5, 1]])
    ours = check(
        device,
        tensors,
        tokens_per_frame=33,
        token_offset=20,
        window=1,
        kv_lens=lens,
        cu_frames=[0, 2, 3, 4],
        scale=-0.3,
    )
    assert ours["k"][:, 3].eq(0).all(), "no token of the shard attends to the last frame"
    assert ours["out"][1, :46].eq(0).all(), "no audio at all in the first clip of sample 1"


@pytest.mark.parametrize(("speakers", "audio", "window"), [(2, 5, 0), (3, 5, 1), (5, 8, 0)])
def test_speakers(device: Device, speakers: int, audio: int, window: int) -> None:
    tensors = inputs(torch.bfloat16, 64, audio, per_frame=18, frames=3, speakers=speakers)
    lens = torch.randint(0, audio + 1, (1, speakers, 3))
    check(device, tensors, tokens_per_frame=18, window=window, kv_lens=lens)


def test_one_frame_is_shared_by_all_blocks_of_the_grid(device: Device) -> None:
    check(device, inputs(torch.bfloat16, 128, 5, per_frame=200, frames=1, heads=1), tokens_per_frame=200)


def test_more_keys_than_tensor_cores_take_at_once(device: Device) -> None:
    tensors = inputs(torch.bfloat16, 32, 49, per_frame=3, heads=1)
    check(device, tensors, tokens_per_frame=3, window=1)  # 98 keys: general kernels
    tensors = inputs(torch.bfloat16, 32, 33, per_frame=3, heads=1)
    check(device, tensors, tokens_per_frame=3, window=1)  # 66: tensor cores forward, general kernels backward


def test_strided_rows_and_misaligned_rows(device: Device) -> None:
    tensors = inputs(torch.bfloat16, 32, 5, per_frame=20, heads=3)

    def strided(value: Tensor) -> Tensor:  # heads before tokens, in the middle of wider rows
        wide = device.empty(*value.shape[:-3], value.shape[-2], value.shape[-3], 48, dtype=value.dtype).zero_()
        view = wide.transpose(-2, -3)[..., 8:40]
        return view.copy_(value.detach()).detach()

    def misaligned(value: Tensor) -> Tensor:
        wide = device.empty(*value.shape[:-1], 33, dtype=value.dtype).zero_()
        return wide[..., 1:].copy_(value.detach()).detach()

    apart = check(device, tensors, place=strided, tokens_per_frame=20)
    dense = check(device, tensors, tokens_per_frame=20)
    assert all(torch.equal(apart[name], dense[name]) for name in dense)
    # Without 16-byte accesses the general kernels work: also right, with other roundings.
    other = check(device, tensors, place=misaligned, tokens_per_frame=20)
    assert not torch.equal(other["k"], dense["k"])


def test_a_shard_without_tokens_leaves_zero_gradients(device: Device) -> None:
    tensors = inputs(torch.bfloat16, 32, 5, per_frame=16)
    tensors["q"] = tensors["q"][:, :0]
    grad = torch.zeros(1, 0, 2, 32, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        placed = {name: device.put(x) for name, x in tensors.items()}
        return list(gradients(ops.audio_attention, placed, grad, {"tokens_per_frame": 16}).values())

    out, _, grad_k, grad_v = device.orders(run)
    assert out.shape == (1, 0, 2, 32)
    assert grad_k.eq(0).all()
    assert grad_v.eq(0).all()
