# SPDX-License-Identifier: Apache-2.0
"""The network of the Wan 2.1 autoencoder alone: what diffusers' `AutoencoderKLWan` computes.

diffusers is the library for this autoencoder, and what is trained, saved, tiled or shared by processes is of its class.
To import it takes longer than a small model takes to make a video, so a video of a small model is made by this one.
Where diffusers' class is loaded for use it has these layers (`talkingdit.autoencoders.wan.exchange_layers`), so that
all ways make the same frames. Names of layers and parameters, and the caches of a stream, are those of diffusers;
`streaming.py` and `tail.py` use either.

Results are diffusers' to the last bit, but for float32 on a CPU. There a convolution over time is a sum of convolutions
of frames whose channels lie together, and equal up to rounding: torch 2.13 takes six times as long for the one as for
the others where a latent is small (`findings/conv3d_one_video.sh`), and nine times for a norm over channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit.nn.configured import BareModel, configured

CACHED_FRAMES = 2  # what a convolution over three frames remembers
_BEGUN = "Rep"  # in the place of a cache: a stage that doubles frames has seen the first one, which it does not double


class WanCausalConv3d(nn.Conv3d):
    """A convolution that sees no later frame; what came before is zero, or the frames of a cache."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int, int], **options: Any):
        super().__init__(inputs, outputs, kernel, **options)
        frames, rows, columns = (int(n) for n in self.padding)
        self._padding = (columns, columns, rows, rows, 2 * frames, 0)
        self.padding = (0, 0, 0)
        self._taps: tuple[Tensor | None, int | None, list[Tensor]] = (None, None, [])

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        padding = list(self._padding)
        if cache is not None and padding[4] > 0:
            x = torch.cat([cache, x], dim=2)
            padding[4] -= cache.shape[2]
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if x.dtype == torch.float32 and x.device.type == "cpu" and not (trains or torch.is_autocast_enabled("cpu")):
            return self._by_frames(x, padding[4])
        return super().forward(F.pad(x, padding))

    def _by_frames(self, x: Tensor, missing: int) -> Tensor:
        """The same of [B, C, T, H, W] as a sum over the taps in time; so many frames of zeros are missing in front."""
        taps, step, around = int(self.kernel_size[0]), int(self.stride[0]), (self._padding[2], self._padding[0])
        count = (x.shape[2] + missing - taps) // step + 1
        made: list[Tensor] = []
        for tap in reversed(range(taps)):
            skipped = max(0, -((tap - missing) // step))  # outputs for which this tap sees zeros; none for the last tap
            if skipped < count:
                first = tap - missing + step * skipped
                seen = _frames(x[:, :, first : first + step * (count - skipped) : step])
                bias = None if made else self.bias
                part = F.conv2d(seen, self._tap(tap), bias, self.stride[1:], around).unflatten(0, (x.shape[0], -1))
                if made:
                    made[0][:, skipped:] += part
                else:
                    made.append(part)
        return made[0].transpose(1, 2)

    def _tap(self, number: int) -> Tensor:
        """The weight of one of the frames, channels together; kept until the weight is another."""
        weight, (of, version, taps) = (
            self.weight.detach(),
            self._taps,
        )  # keeps the memory, so that no other has its place
        now = None if weight.is_inference() else self.weight._version
        if of is None or of.data_ptr() != weight.data_ptr() or version != now or of.dtype != weight.dtype:
            taps = [tap.contiguous(memory_format=torch.channels_last) for tap in weight.unbind(2)]
            self._taps = weight, now, taps
        return taps[number]


def _frames(x: Tensor) -> Tensor:
    """The frames [B * T, C, H, W] of a video, the channels of a pixel together; a view where they are already."""
    return x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


class StreamCaches:
    """The caches of a stream, one after the other in the order of the convolutions.

    Args:
        caches: as of `talkingdit.autoencoders.streaming.feature_caches`.
        place: a list of one number, the next cache.
    """

    def __init__(self, caches: list[Any], place: list[int]):
        self.caches, self.place = caches, place

    def take(self) -> tuple[int, Any]:
        """The number of the next cache, and what is in it."""
        number = self.place[0]
        self.place[0] += 1
        return number, self.caches[number]

    def through(self, conv: nn.Module, x: Tensor) -> Tensor:
        """A causal convolution of the next frames."""
        number, cache = self.take()
        self.caches[number] = _last(x, cache)
        return conv(x, cache)


def _last(x: Tensor, cache: Tensor | None) -> Tensor:
    """The frames to remember of x and of those before it."""
    last = x[:, :, -CACHED_FRAMES:].clone()
    return last if cache is None or last.shape[2] == CACHED_FRAMES else torch.cat([cache[:, :, -1:], last], dim=2)


class WanRMS_norm(nn.Module):
    """Root mean square norm over channels, of videos or single frames."""

    def __init__(self, dim: int, axes: int):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return F.normalize(wide, dim=1).to(x.dtype) * self.scale * self.gamma


class WanUpsample(nn.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


class WanResample(nn.Module):
    """Half or twice the rows and columns, and, in the modes that end in 3d, half or twice the frames."""

    def __init__(self, dim: int, mode: str):
        super().__init__()
        self.mode = mode
        if mode.startswith("up"):
            doubled = WanUpsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
            self.resample = nn.Sequential(doubled, nn.Conv2d(dim, dim // 2, 3, padding=1))
            if mode == "upsample3d":
                self.time_conv = WanCausalConv3d(dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=(2, 2)))
            if mode == "downsample3d":
                self.time_conv = WanCausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, stream: StreamCaches) -> Tensor:
        if self.mode == "upsample3d":
            x = self._double(x, stream)
        frames = self.resample(x.transpose(1, 2).flatten(0, 1))
        x = frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        return self._halve(x, stream) if self.mode == "downsample3d" else x

    def _double(self, x: Tensor, stream: StreamCaches) -> Tensor:
        number, cache = stream.take()
        if cache is None:
            stream.caches[number] = _BEGUN
            return x
        begins = isinstance(cache, str)
        stream.caches[number] = _last(x, torch.zeros_like(x[:, :, -1:]) if begins else cache)
        pairs = self.time_conv(x, None if begins else cache).unflatten(1, (2, -1))
        pixels = pairs.permute(0, 3, 1, 4, 5, 2).flatten(1, 2)  # [B, 2 T, H, W, C]
        return pixels.permute(0, 4, 1, 2, 3)

    def _halve(self, x: Tensor, stream: StreamCaches) -> Tensor:
        number, cache = stream.take()
        if cache is None:
            stream.caches[number] = x.clone()
            return x
        stream.caches[number] = x[:, :, -1:].clone()
        return self.time_conv(torch.cat([cache[:, :, -1:], x], dim=2))


class WanResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = WanRMS_norm(inputs, 3)
        self.conv1 = WanCausalConv3d(inputs, outputs, 3, padding=1)
        self.norm2 = WanRMS_norm(outputs, 3)
        self.conv2 = WanCausalConv3d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == outputs else WanCausalConv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, stream: StreamCaches) -> Tensor:
        around = self.conv_shortcut(x)
        x = stream.through(self.conv1, F.silu(self.norm1(x)))
        return stream.through(self.conv2, F.silu(self.norm2(x))) + around


class WanAttentionBlock(nn.Module):
    """Attention of one head over each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = WanRMS_norm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        rows = self.to_qkv(self.norm(frames)).flatten(2)[:, None].transpose(2, 3).contiguous()
        q, k, v = rows.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        y = self.proj(y.reshape(frames.shape))
        return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2) + x


class WanMidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([WanAttentionBlock(dim)])
        self.resnets = nn.ModuleList([WanResidualBlock(dim, dim), WanResidualBlock(dim, dim)])

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        stream = StreamCaches(feat_cache, feat_idx)
        return self.resnets[1](self.attentions[0](self.resnets[0](x, stream)), stream)


class WanUpBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int, mode: str | None):
        super().__init__()
        self.resnets = nn.ModuleList([WanResidualBlock(outputs if i else inputs, outputs) for i in range(blocks + 1)])
        self.upsamplers = None if mode is None else nn.ModuleList([WanResample(outputs, mode)])

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int], first_chunk: bool = False) -> Tensor:
        stream = StreamCaches(feat_cache, feat_idx)
        for block in (*self.resnets, *(self.upsamplers or ())):
            x = block(x, stream)
        return x


class _Half(nn.Module):
    """What the encoder and the decoder have in common: they begin and end with a convolution."""

    def _ends(self, inputs: int, first: int, last: int, outputs: int) -> None:
        self.conv_in = WanCausalConv3d(inputs, first, 3, padding=1)
        self.norm_out = WanRMS_norm(last, 3)
        self.conv_out = WanCausalConv3d(last, outputs, 3, padding=1)
        self.nonlinearity = nn.SiLU()


class WanEncoder3d(_Half):
    def __init__(self, inputs: int, widths: Sequence[int], outputs: int, blocks: int, halves: Sequence[bool]):
        super().__init__()
        self._ends(inputs, widths[0], widths[-1], outputs)
        self.mid_block = WanMidBlock(widths[-1])
        self.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(itertools.pairwise(widths)):
            self.down_blocks += [WanResidualBlock(width if j else before, width) for j in range(blocks)]
            if i < len(widths) - 2:
                self.down_blocks.append(WanResample(width, "downsample3d" if halves[i] else "downsample2d"))

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        stream = StreamCaches(feat_cache, feat_idx)
        x = stream.through(self.conv_in, x)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, feat_cache, feat_idx)
        return stream.through(self.conv_out, self.nonlinearity(self.norm_out(x)))


class WanDecoder3d(_Half):
    def __init__(self, inputs: int, widths: Sequence[int], outputs: int, blocks: int, doubles: Sequence[bool]):
        super().__init__()
        self._ends(inputs, widths[0], widths[-1], outputs)
        self.mid_block = WanMidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(itertools.pairwise(widths)):
            mode = None if i == len(widths) - 2 else "upsample3d" if doubles[i] else "upsample2d"
            # What comes from an upsampling has half the channels.
            self.up_blocks.append(WanUpBlock(before // 2 if i else before, width, blocks, mode))

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int], first_chunk: bool = False) -> Tensor:
        stream = StreamCaches(feat_cache, feat_idx)
        x = self.mid_block(stream.through(self.conv_in, x), feat_cache, feat_idx)
        for block in self.up_blocks:
            x = block(x, feat_cache, feat_idx, first_chunk)
        return stream.through(self.conv_out, self.nonlinearity(self.norm_out(x)))


class BareAutoencoderKLWan(BareModel):
    """The encoder and the decoder. Arguments are those of diffusers' `AutoencoderKLWan`.

    Raises:
        ValueError: the blocks of Wan 2.2, attention outside of the middle or dropout are asked for.
    """

    use_tiling = False

    @configured
    def __init__(
        self,
        base_dim: int = 96,
        decoder_base_dim: int | None = None,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attn_scales: Sequence[float] = (),
        temperal_downsample: Sequence[bool] = (False, True, True),
        dropout: float = 0.0,
        latents_mean: Sequence[float] = (),
        latents_std: Sequence[float] = (),
        is_residual: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int | None = None,
        scale_factor_temporal: int = 4,
        scale_factor_spatial: int = 8,
    ):
        super().__init__()
        if not plain(self.config):
            raise ValueError("BareAutoencoderKLWan: is_residual, attn_scales and dropout must be left out")
        down = [base_dim * n for n in (1, *dim_mult)]
        up = [(decoder_base_dim or base_dim) * n for n in (dim_mult[-1], *reversed(dim_mult))]
        doubles = list(reversed(temperal_downsample))
        self.encoder = WanEncoder3d(in_channels, down, 2 * z_dim, num_res_blocks, temperal_downsample)
        self.quant_conv = WanCausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = WanCausalConv3d(z_dim, z_dim, 1)
        self.decoder = WanDecoder3d(z_dim, up, out_channels, num_res_blocks, doubles)


def plain(config: Mapping[str, Any]) -> bool:
    """Is an autoencoder of this configuration one that `BareAutoencoderKLWan` can be?"""
    return not (config.get("is_residual") or config.get("attn_scales") or config.get("dropout"))
