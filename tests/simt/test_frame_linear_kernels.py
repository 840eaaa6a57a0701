# SPDX-License-Identifier: Apache-2.0
"""frame_linear's GPU kernel, emulated: frames that tiles and shards cut, every part of its epilogue, all dtypes."""

from __future__ import annotations

import sys

import pytest
import torch
from emulated_device import Device
from torch import Tensor

from talkingdit import ops
from talkingdit.nn.audio_cross_attention import AudioCrossAttention

_MODULE = sys.modules["talkingdit.ops.frame_linear"]


@pytest.fixture
def gpu(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(_MODULE, "native", device.module)
    monkeypatch.setattr(_MODULE, "used_for", lambda x: True)
    return device


def draw(dtype: torch.dtype, batch: int, tokens: int, frames: int, inner: int, dim: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "x": (batch, tokens, inner),
        "weight": (batch, frames, inner, dim),
        "bias": (dim,),
        "gate": (dim,),
        "mask": (batch, tokens),
        "residual": (batch, tokens, dim),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def check(device: Device, given: dict[str, Tensor], tokens_per_frame: int, offset: int, align: int = 16) -> None:
    def run() -> list[Tensor]:
        placed = {name: device.put(value, align) for name, value in given.items()}
        plain = ops.frame_linear(placed["x"], placed["weight"], tokens_per_frame, token_offset=offset)
        whole = ops.frame_linear(tokens_per_frame=tokens_per_frame, token_offset=offset, **placed)
        stream = placed["residual"]
        ops.frame_linear(tokens_per_frame=tokens_per_frame, token_offset=offset, **placed, out=stream)
        return [plain, whole, stream]

    plain, whole, stream = device.orders(run)
    assert torch.equal(whole, stream)
    options = {"tokens_per_frame": tokens_per_frame, "token_offset": offset}
    for ours, names in ((plain, ("x", "weight")), (whole, tuple(given))):
        inputs = {name: given[name] for name in names}
        eager = ops.frame_linear_reference(**inputs, **options)
        truth = ops.frame_linear_reference(**{k: v.double() for k, v in inputs.items()}, **options)
        assert ours.dtype == eager.dtype
        error, allowed = (float((value.double() - truth).norm() / truth.norm()) for value in (ours, eager))
        assert error <= 2 * max(allowed, 1e-15), f"error {error:.3g}, {allowed:.3g} of eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_frames_longer_than_a_tile(gpu: Device, dtype: torch.dtype) -> None:
    check(gpu, draw(dtype, 1, 150, 2, 72, 136), 140, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shards_that_cut_frames(gpu: Device, dtype: torch.dtype) -> None:
    """Frames shorter than a tile, odd sizes, memory aligned to single elements."""
    check(gpu, draw(dtype, 2, 20, 4, 15, 19), 9, 13, align=dtype.itemsize)


def test_residual_stream_of_float32(gpu: Device) -> None:
    given = draw(torch.bfloat16, 1, 24, 2, 40, 20)
    check(gpu, {**given, "residual": given["residual"].float() / 3, "mask": given["mask"].float()}, 12, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "size", "absorb"), [(4, 8, "value"), (3, 32, "value"), (1, 1024, "full")])
def test_absorbed_cross_attention(gpu: Device, dtype: torch.dtype, heads: int, size: int, absorb: str) -> None:
    """The module, adding to part of a wider residual stream; weights from `ops.audio_attention` where heads have 32
    channels; the single wide head is HunyuanVideo-Avatar's adapter."""
    torch.manual_seed(5)
    batch, frames, per_frame, tokens, dim = 2, 2, 7, 16, 40
    module = AudioCrossAttention(dim, heads, qk_norm=False, head_dim=size).to(dtype).requires_grad_(False)
    x, audio = (torch.randn(batch, *shape, dim).to(dtype) for shape in ((frames * per_frame,), (frames, tokens)))
    face = (torch.rand(batch, frames * per_frame) < 0.5).to(dtype)
    residual = torch.randn(batch, frames * per_frame + 3, dim, dtype=torch.promote_types(dtype, torch.float32))

    def run() -> list[Tensor]:
        stream = gpu.put(residual)
        noisy = stream[:, : frames * per_frame]
        memory = module.memory(gpu.put(audio), absorb)
        assert module(gpu.put(x), per_frame, memory=memory, mask=face, residual=noisy, out=noisy) is noisy
        return [stream]

    (stream,) = gpu.orders(run)
    truth = residual.double().clone()
    module.double()
    heard = _plain(module, x.double(), audio.double(), per_frame)
    truth[:, : frames * per_frame] += face.double()[..., None] * heard
    assert torch.equal(stream[:, frames * per_frame :], residual[:, frames * per_frame :])
    assert torch.equal(stream[:, : frames * per_frame][face == 0], residual[:, : frames * per_frame][face == 0])
    error = float((stream.double() - truth).norm() / (truth - residual.double()).norm())
    assert error < {torch.bfloat16: 1e-2, torch.float64: 1e-13}[dtype]


def _plain(module: AudioCrossAttention, x: Tensor, audio: Tensor, per_frame: int) -> Tensor:
    """Unabsorbed attention to the frame's tokens."""
    q = module.q(x).unflatten(-1, (module.num_heads, -1)).unflatten(1, (-1, per_frame)).transpose(2, 3)
    k, v = (layer(audio).unflatten(-1, (module.num_heads, -1)).transpose(2, 3) for layer in (module.k, module.v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return module.o(out.transpose(2, 3).flatten(3).flatten(1, 2))


def test_binding_refuses_frames_without_a_matrix(gpu: Device) -> None:
    given = draw(torch.float32, 1, 8, 1, 4, 4)
    out = torch.empty(1, 8, 4)
    with pytest.raises(ValueError, match="frame_linear: weight has fewer frames than x"):
        gpu.module.frame_linear(given["x"], given["weight"], None, None, None, None, out, 4, 0)
