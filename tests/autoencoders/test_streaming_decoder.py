# SPDX-License-Identifier: Apache-2.0
"""Streaming through the autoencoder must equal diffusers' own encode and decode of the whole video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from tiny_checkpoint import make_vae

from talkingdit.autoencoders.streaming import StreamingDecoder, encode, to_frames, to_video
from talkingdit.autoencoders.tail import lookback


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(3)
    return make_vae()


def statistics(vae: AutoencoderKLWan) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encoding_equals_diffusers(vae: AutoencoderKLWan, frames: int) -> None:
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    mean, std = statistics(vae)
    with torch.no_grad():
        wanted = (vae.encode(video).latent_dist.mode() - mean) / std
    torch.testing.assert_close(encode(vae, video), wanted, rtol=1e-5, atol=1e-5)


def test_streaming_in_pieces_equals_decoding_at_once(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(1, 16, 7, 4, 4)
    mean, std = statistics(vae)
    with torch.no_grad():
        wanted = vae.decode(latents * std + mean).sample
    decoder = StreamingDecoder(vae)
    pieces = [decoder(piece) for piece in latents.split([1, 3, 1, 2], dim=2)]
    assert [piece.shape[2] for piece in pieces] == [1, 12, 4, 8]
    torch.testing.assert_close(torch.cat(pieces, dim=2), wanted, rtol=0, atol=1e-6)


def test_two_streams_do_not_disturb_each_other(vae: AutoencoderKLWan) -> None:
    latents = torch.randn(2, 16, 4, 4, 4)
    alone = [StreamingDecoder(vae)(one[None]) for one in latents]
    decoders = [StreamingDecoder(vae), StreamingDecoder(vae)]
    mixed: list[list[torch.Tensor]] = [[], []]
    for k in range(4):
        for i in range(2):
            mixed[i].append(decoders[i](latents[i : i + 1, :, k : k + 1]))
            with torch.no_grad():
                vae.decode(torch.randn(1, 16, 2, 4, 4))
    for i in range(2):
        torch.testing.assert_close(torch.cat(mixed[i], dim=2), alone[i], rtol=0, atol=1e-6)


def test_a_stream_keeps_no_more_the_longer_it_runs(vae: AutoencoderKLWan) -> None:
    decoder = StreamingDecoder(vae)

    def held() -> int:
        return sum(cache.untyped_storage().nbytes() for cache in decoder._caches if isinstance(cache, torch.Tensor))

    decoder(torch.randn(1, 16, 3, 4, 4))
    before = held()
    for _ in range(3):
        decoder(torch.randn(1, 16, 2, 4, 4))
    assert held() == before > 0


def shallow(kind: str) -> AutoencoderKLWan:
    """An autoencoder whose every weight matters: random ones of the usual size hide what is far away."""
    torch.manual_seed(5)
    small = {"dim_mult": [1, 2, 2, 2], "temperal_downsample": [False, True, True], "num_res_blocks": 1, "base_dim": 4}
    patched = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "is_residual": True}
    if kind == "puppets":
        vae = make_vae()
    else:
        vae = AutoencoderKLWan(**small, **(patched if kind == "wan 2.2" else {}), z_dim=16, attn_scales=[]).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.15)
    return vae


@pytest.mark.parametrize("kind", ["puppets", "wan 2.1", "wan 2.2"])
def test_a_stream_resumes_from_the_latents_that_the_decoder_sees(kind: str) -> None:
    """Bit for bit, behind no more latents than `lookback`, and in pieces of another size."""
    vae = shallow(kind)
    latents = torch.randn(1, 16, 60, 2, 2, generator=torch.Generator().manual_seed(1))
    wanted = StreamingDecoder(vae)(latents)
    assert wanted.std() > 0.02
    seen = lookback(vae)
    assert seen < 45
    decoder = StreamingDecoder(vae)
    decoder.resume(latents[:, :, 45 - seen : 45])
    end = torch.cat([decoder(piece) for piece in latents[:, :, 45:].split([1, 8, 6], dim=2)], dim=2)
    assert torch.equal(end, wanted[:, :, 1 + 4 * 44 :])


@pytest.mark.parametrize("past", [0, 1, 3])
def test_a_stream_resumes_near_the_beginning_from_all_latents(vae: AutoencoderKLWan, past: int) -> None:
    latents = torch.randn(1, 16, 6, 4, 4)
    wanted = StreamingDecoder(vae)(latents)
    decoder = StreamingDecoder(vae)
    decoder(torch.randn(1, 16, 2, 4, 4))  # what it did before is forgotten
    decoder.resume(latents[:, :, :past])
    made = decoder(latents[:, :, past:])
    assert torch.equal(made, wanted[:, :, wanted.shape[2] - made.shape[2] :])
    assert made.shape[2] == 4 * (6 - past) - (3 if past == 0 else 0)


def test_the_number_of_latents_that_the_decoder_sees() -> None:
    """Of the released autoencoder; and the tiny one would not be right behind far fewer."""
    with torch.device("meta"):
        assert lookback(AutoencoderKLWan()) == 38
    vae = shallow("puppets")
    latents = torch.randn(1, 16, 40, 2, 2, generator=torch.Generator().manual_seed(1))
    wanted = StreamingDecoder(vae)(latents)[:, :, -4:]
    decoder = StreamingDecoder(vae)
    decoder.resume(latents[:, :, 39 - lookback(vae) // 2 : 39])
    assert not torch.equal(decoder(latents[:, :, 39:]), wanted)


def test_frames_and_video_are_inverse() -> None:
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3) * 2
    np.testing.assert_array_equal(to_frames(to_video(frames)), frames)


def test_a_wrong_number_of_frames_is_named(vae: AutoencoderKLWan) -> None:
    with pytest.raises(ValueError, match=r"video must have shape \[B, 3, 1 \+ 4 n, H, W\], got \[1, 3, 4, 32, 32\]"):
        encode(vae, torch.zeros(1, 3, 4, 32, 32))
