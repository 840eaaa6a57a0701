# SPDX-License-Identifier: Apache-2.0
"""The autoencoder on strips of rows must equal the whole autoencoder, and leave the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan
from tiny_checkpoint import make_vae
from torch import Tensor, nn

from talkingdit.autoencoders.streaming import StreamingDecoder, encode
from talkingdit.autoencoders.strips import Autoencoder, Strips, check_split, on_strips
from talkingdit.autoencoders.tail import decode_after
from talkingdit.distributed.team import Team
from talkingdit.errors import UserError

PATIENCE = 240.0  # seconds; the first job of a process imports everything
SMALL = {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True], "num_res_blocks": 1, "base_dim": 4}
PATCHED = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
VAES: dict[str, dict[str, Any]] = {
    "wan 2.1": {**SMALL},
    "wan 2.2": {**SMALL, **PATCHED, "is_residual": True},
    "attention at a large scale": {**SMALL, "attn_scales": [0.5]},
}
FACTORS = {"wan 2.1": 8, "wan 2.2": 16, "attention at a large scale": 8, "puppets": 8}


def build(name: str) -> AutoencoderKLWan:
    torch.manual_seed(5)
    vae = make_vae() if name == "puppets" else AutoencoderKLWan(**VAES[name]).eval()
    for parameter in vae.parameters():  # so that neighbouring rows matter, and are told from each other
        torch.nn.init.normal_(parameter, mean=0.05, std=0.15)
    return vae


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shared(vae: AutoencoderKLWan, split: bool = True) -> Autoencoder:
    return Autoencoder(vae, Team.start(), dist.group.WORLD, split)


def decode_all(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    vae = build(name)
    latents = draw(1, 16, 5, rows, columns)
    stream, late = shared(vae).stream(), shared(vae).stream()
    late.resume(latents[:, :, :3])
    return {
        "resumed": late(latents[:, :, 3:]),
        "stream": torch.cat([stream(latents[:, :, :1]), stream(latents[:, :, 1:3]), stream(latents[:, :, 3:])], dim=2),
        "tail": shared(vae).decode_after(latents[:, :, :3], latents[:, :, 3:]),
    }


@pytest.mark.parametrize(
    ("name", "size", "rows"),
    [("wan 2.1", 2, 5), ("wan 2.1", 4, 6), ("wan 2.2", 3, 4), ("puppets", 2, 3)],
)
def test_strips_decode_to_whole_frames(processes: Any, name: str, size: int, rows: int) -> None:
    vae, latents = build(name), draw(1, 16, 5, rows, 2)
    wanted = {
        "stream": StreamingDecoder(vae)(latents),
        "resumed": StreamingDecoder(vae)(latents)[:, :, 9:],
        "tail": decode_after(vae, latents[:, :, :3], latents[:, :, 3:]),
    }
    assert wanted["stream"].std() > 0.02
    results = processes(size, decode_all, name, rows, 2, timeout=PATIENCE)
    for rank, made in enumerate(results):
        for path, frames in wanted.items():
            assert frames.shape == made[path].shape
            torch.testing.assert_close(made[path], frames, rtol=0, atol=1e-5)
            assert torch.equal(made[path], results[0][path]), rank  # the same on every process, to the last bit
        assert torch.equal(made["resumed"], made["stream"][:, :, 9:])


def resume_alone() -> tuple[bool, int]:
    """The first process decodes for all: whether a stream that resumes goes on as one that has seen it all."""
    vae, latents, runs = build("wan 2.1"), draw(1, 16, 5, 4, 3), []
    vae.decoder.conv_out.register_forward_hook(lambda *_: runs.append(1))
    stream, late = shared(vae, split=False).stream(), shared(vae, split=False).stream()
    late.resume(latents[:, :, :3])
    return torch.equal(late(latents[:, :, 3:]), stream(latents)[:, :, 9:]), len(runs)


def test_a_stream_of_the_first_process_resumes(processes: Any) -> None:
    assert processes(2, resume_alone, timeout=PATIENCE) == [(True, 10), (True, 0)]


def test_a_stream_of_one_process_resumes() -> None:
    vae, latents = build("wan 2.1"), draw(1, 16, 5, 4, 3)
    stream = Autoencoder(vae).stream()
    stream.resume(latents[:, :, :3])
    assert torch.equal(stream(latents[:, :, 3:]), StreamingDecoder(vae)(latents)[:, :, 9:])


def encode_all(name: str, height: int, width: int) -> Tensor:
    return shared(build(name)).encode(draw(1, 3, 9, height, width).clamp(-1, 1))


@pytest.mark.parametrize(("name", "size", "rows"), [("wan 2.1", 2, 3), ("wan 2.1", 4, 5), ("wan 2.2", 2, 3)])
def test_strips_encode_to_the_latents_of_the_whole(processes: Any, name: str, size: int, rows: int) -> None:
    height, width = rows * FACTORS[name], 3 * FACTORS[name]
    wanted = encode(build(name), draw(1, 3, 9, height, width).clamp(-1, 1))
    for made in processes(size, encode_all, name, height, width, timeout=PATIENCE):
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


def attend(name: str) -> Tensor:
    vae = build(name)
    check_split(vae)
    return shared(vae).decode_after(draw(1, 16, 1, 4, 4), draw(1, 16, 2, 4, 4, seed=1))


def test_attention_in_later_blocks_sees_the_whole_frame(processes: Any) -> None:
    name = "attention at a large scale"
    wanted = decode_after(build(name), draw(1, 16, 1, 4, 4), draw(1, 16, 2, 4, 4, seed=1))
    torch.testing.assert_close(processes(2, attend, name, timeout=PATIENCE)[1], wanted, rtol=0, atol=1e-5)


def where_it_ran(rows: int, split: bool, tiled: bool) -> tuple[Tensor, int]:
    vae = build("wan 2.1")
    if tiled:
        vae.enable_tiling(16, 16, 8, 8)
    runs = []
    vae.decoder.conv_out.register_forward_hook(lambda *_: runs.append(1))
    made = shared(vae, split).decode_after(draw(1, 16, 1, rows, 3), draw(1, 16, 1, rows, 3, seed=1))
    return made, len(runs)


@pytest.mark.parametrize(
    ("rows", "split", "tiled"), [(4, False, False), (1, True, False), (4, True, True)], ids=["one", "small", "tiles"]
)
def test_otherwise_the_first_process_decodes_for_all(processes: Any, rows: int, split: bool, tiled: bool) -> None:
    vae = build("wan 2.1")
    if tiled:
        vae.enable_tiling(16, 16, 8, 8)
    wanted = Autoencoder(vae).decode_after(draw(1, 16, 1, rows, 3), draw(1, 16, 1, rows, 3, seed=1))
    results = processes(2, where_it_ran, rows, split, tiled, timeout=PATIENCE)
    assert [runs > 0 for _, runs in results] == [True, False]
    for made, _ in results:
        assert torch.equal(made, wanted)


def forwards(part: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__.get("forward") for name, module in part.named_modules()}


def swap_and_restore() -> tuple[int, bool, bool]:
    vae = build("wan 2.1")
    hook: Callable[..., Tensor] = vae.decoder.conv_out.forward
    vae.decoder.conv_out.forward = lambda *given: hook(*given)  # as libraries that offload do
    before = forwards(vae.decoder)
    strips = Strips.of(4, dist.group.WORLD)
    with on_strips(vae.decoder, strips):
        changed = sum(before[name] is not now for name, now in forwards(vae.decoder).items())
    after = forwards(vae.decoder) == before
    with pytest.raises(RuntimeError, match="in the middle"), on_strips(vae.decoder, strips):
        raise RuntimeError("in the middle")
    return changed, after, forwards(vae.decoder) == before


def test_the_model_is_put_back_also_after_an_error(processes: Any) -> None:
    for changed, after, after_error in processes(2, swap_and_restore, timeout=PATIENCE):
        assert changed > 10
        assert after
        assert after_error


def test_a_layer_of_another_kind_is_refused_not_decoded_wrongly() -> None:
    vae = build("wan 2.1")
    check_split(vae)
    other = copy.deepcopy(vae)
    other.decoder.mid_block.resnets[0].norm1 = nn.GroupNorm(1, 8)
    with pytest.raises(UserError, match=r"cannot be split, mid_block.resnets.0.norm1 of type GroupNorm; use vae=one"):
        check_split(other)
    wide = copy.deepcopy(vae)
    wide.decoder.up_blocks[0].upsamplers[0].resample[1] = nn.Conv2d(8, 4, 5, padding=2)
    with pytest.raises(UserError, match=r"resample.1 of kernel, stride and padding \(5, 1, 2\)"):
        check_split(wide)
    loose = copy.deepcopy(vae)
    loose.encoder.down_blocks[1].resample[0] = nn.Identity()
    with pytest.raises(UserError, match=r"resample.1 of kernel, stride and padding \(3, 2, 0\)"):
        check_split(loose)
