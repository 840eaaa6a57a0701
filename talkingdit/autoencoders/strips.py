# SPDX-License-Identifier: Apache-2.0
"""The Wan autoencoder on several processes, each with some rows of every frame; together exactly the whole.

A process keeps a strip of whole latent rows through all layers. Most layers look at one pixel at a time, or double or
halve rows in place: they run on the strip as they are. What is left:

    convolutions over 3 x 3       get one row of either neighbour, and the two rows too many are cut off the result
    halving convolutions          pad a row below, which is the first one of the next strip
    attention over a frame        runs on the whole frame, at latent resolution, and keeps the own rows

These layers are changed for the time of a call and then put back. The loops over time, in `streaming.py`
and `tail.py`, are the same for strips as for whole frames: their caches just hold the rows of the strip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from talkingdit.autoencoders.streaming import StreamingDecoder, encode
from talkingdit.autoencoders.tail import decode_after
from talkingdit.distributed.team import ALONE, Team, gather
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

# Layers whose every row depends on the same row before it (or on half or twice its number), or that only hold others.
LOCAL = {
    *("WanEncoder3d", "WanDecoder3d", "WanMidBlock", "WanResidualBlock", "WanResidualDownBlock", "WanUpBlock"),
    *("WanResidualUpBlock", "WanResample", "WanUpsample", "WanRMS_norm", "AvgDown3D", "DupUp3D"),
    *("ModuleList", "Sequential", "SiLU", "Dropout", "Identity"),
}


@dataclass(frozen=True)
class Strips:
    """Which rows of a frame each process has.

    Args:
        group: the processes.
        ends: end of every process's latent rows; each has one at least.
    """

    group: dist.ProcessGroup
    ends: tuple[int, ...]

    @staticmethod
    def of(rows: int, group: dist.ProcessGroup) -> Strips:
        """Strips of a frame of so many latent rows, as equal as can be."""
        size = dist.get_world_size(group)
        return Strips(group, tuple(rows * (rank + 1) // size for rank in range(size)))

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def sizes(self) -> list[int]:
        """Latent rows of every process."""
        return [end - begin for begin, end in zip((0, *self.ends), self.ends, strict=False)]

    def own(self, x: Tensor) -> Tensor:
        """The rows of this process of whole frames [..., H, W], H a multiple of the latent rows."""
        scale = x.shape[-2] // self.ends[-1]
        begin = (0, *self.ends)[self.rank]
        return x[..., begin * scale : self.ends[self.rank] * scale, :]

    def whole(self, x: Tensor) -> Tensor:
        """Whole frames [..., H, W] on every process, from the rows of each."""
        sizes = self.sizes()
        scale, longest = x.shape[-2] // sizes[self.rank], max(sizes)
        # Rows first, so that the strips lie behind each other; short ones are padded, as gloo wants equal sizes.
        mine = x.new_zeros(longest * scale, *x.shape[:-2], x.shape[-1])
        mine[: x.shape[-2]] = x.movedim(-2, 0)
        strips = gather(mine, self.group).unflatten(0, (len(sizes), -1))
        return torch.cat([strip[: n * scale] for strip, n in zip(strips, sizes, strict=True)]).movedim(0, -2)

    def extended(self, x: Tensor, above: bool, below: bool) -> tuple[Tensor, bool, bool]:
        """The strip [..., n, W] with the neighbours' rows around it.

        Args:
            above, below: whether a row above and one below is wanted.

        Returns:
            [..., n to n + 2, W], and whether there is a row above and below now: not at the edges of the frame.
        """
        last = len(self.ends) - 1
        has_above, has_below = above and self.rank > 0, below and self.rank < last
        messages: list[dist.P2POp] = []

        def exchange(neighbour: int, mine: Tensor | None, wanted: bool) -> Tensor | None:
            peer = dist.get_global_rank(self.group, neighbour)
            if mine is not None:
                messages.append(dist.P2POp(dist.isend, mine.contiguous(), peer, self.group))
            got = None
            if wanted:
                got = torch.empty_like(x[..., :1, :], memory_format=torch.contiguous_format)
                messages.append(dist.P2POp(dist.irecv, got, peer, self.group))
            return got

        rows: list[Tensor | None] = [None, x, None]
        if self.rank > 0:
            rows[0] = exchange(self.rank - 1, x[..., :1, :] if below else None, above)
        if self.rank < last:
            rows[2] = exchange(self.rank + 1, x[..., -1:, :] if above else None, below)
        if messages:
            for work in dist.batch_isend_irecv(messages):
                work.wait()
        return torch.cat([row for row in rows if row is not None], dim=-2), has_above, has_below


Forward = Callable[..., Tensor]


def _with_neighbours(strips: Strips, forward: Forward, above: bool, below: bool) -> Forward:
    """A layer that sees one row further, on strips. A cache of frames before goes through it in the same way."""

    def on_strip(x: Tensor, cache: Tensor | None = None) -> Tensor:
        frames = 0 if cache is None else cache.shape[2]
        both = x if cache is None else torch.cat([cache, x], dim=2)
        longer, has_above, has_below = strips.extended(both, above, below)
        y = forward(longer) if cache is None else forward(longer[:, :, frames:], longer[:, :, :frames])
        return y[..., int(has_above) : y.shape[-2] - int(has_below), :]

    return on_strip


def _of_whole_frames(strips: Strips, forward: Forward) -> Forward:
    def on_strip(x: Tensor) -> Tensor:
        return strips.own(forward(strips.whole(x)))

    return on_strip


def _on_strips(part: nn.Module) -> list[tuple[nn.Module, Callable[[Strips, Forward], Forward]]]:
    """The layers of an encoder or decoder that need to know of strips, and what makes them so.

    Raises:
        UserError: there is a layer of which that is not known.
    """

    def neighbours(above: bool, below: bool) -> Callable[[Strips, Forward], Forward]:
        return lambda strips, forward: _with_neighbours(strips, forward, above, below)

    found: list[tuple[nn.Module, Callable[[Strips, Forward], Forward]]] = []
    padded: set[nn.Module] = set()  # behind padding that brings the row below
    for name, module in part.named_modules():
        kind = type(module).__name__
        if kind == "WanAttentionBlock":
            found.append((module, _of_whole_frames))
        elif kind == "ZeroPad2d" and tuple(module.padding) == (0, 1, 0, 1):
            found.append((module, neighbours(above=False, below=True)))
        elif kind == "Sequential" and [type(child).__name__ for child in module.children()] == ["ZeroPad2d", "Conv2d"]:
            padded.add(list(module.children())[1])
        elif kind in ("WanCausalConv3d", "Conv2d"):
            shape = _rows_of(module)
            if shape == (3, 1, 1):
                found.append((module, neighbours(above=True, below=True)))
            elif shape != (1, 1, 0) and not (shape == (3, 2, 0) and module in padded):
                raise _refusal(f"{name} of kernel, stride and padding {shape}")
        elif kind not in LOCAL:
            raise _refusal(f"{name} of type {kind}")
    return found


def _rows_of(conv: Any) -> tuple[int, int, int]:
    """Kernel, stride and padding of a convolution over rows."""
    # A causal convolution pads by itself: (left, right, above, below, before, after).
    padding = conv._padding[2] if hasattr(conv, "_padding") else conv.padding[-2]
    return conv.kernel_size[-2], conv.stride[-2], padding


def _refusal(layer: str) -> UserError:
    return UserError(f"vae=split: the autoencoder has a layer that cannot be split, {layer}; use vae=one.")


def check_split(vae: AutoencoderKLWan) -> None:
    """Find out whether every layer can run on strips.

    Raises:
        UserError: one cannot; the sentence names it.
    """
    for part in (vae.encoder, vae.decoder):
        _on_strips(part)


@contextmanager
def on_strips(part: nn.Module, strips: Strips) -> Iterator[None]:
    """Let an encoder or decoder take and give the rows of this process. Not for two threads at a time.

    Raises:
        UserError: it has a layer that cannot be split.
    """
    with ExitStack() as stack:
        for module, change in _on_strips(part):
            before = module.__dict__.get("forward")  # hooks of libraries may have set one
            module.forward = change(strips, module.forward)
            stack.callback(_put_back, module, before)
        yield


def _put_back(module: nn.Module, forward: Any) -> None:
    del module.forward
    if forward is not None:
        module.forward = forward


class Autoencoder:
    """An autoencoder that the processes of a team share. Every method is called by all of them with the same
    arguments, and gives all of them the same, to the last bit.

    Args:
        vae: the autoencoder, which every process has; it is only read.
        team: the processes.
        group: of all processes, on the autoencoder's device; None for a team of one.
        split: strips of rows; else the first process computes and tells the others. So it does, too, for frames of
            fewer latent rows than processes, and where `vae.enable_tiling()` was called.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        team: Team = ALONE,
        group: dist.ProcessGroup | None = None,
        split: bool = True,
    ):
        self.vae, self.team, self.group, self._split = vae, team, group, split

    @property
    def device(self) -> torch.device:
        """Where frames and latents are taken and given."""
        return self.vae.device

    def encode(self, video: Tensor) -> Tensor:
        """`talkingdit.autoencoders.streaming.encode`."""
        return self.run(self.vae.encoder, video.shape[-2] / self._scale, lambda x: encode(self.vae, x), video)

    def decode_after(self, past: Tensor, latents: Tensor) -> Tensor:
        """`talkingdit.autoencoders.tail.decode_after`."""
        rows = latents.shape[-2]
        return self.run(self.vae.decoder, rows, lambda p, x: decode_after(self.vae, p, x), past, latents)

    def stream(self) -> SharedStream:
        """A `StreamingDecoder`."""
        return SharedStream(self)

    @property
    def _scale(self) -> int:
        """Rows of a frame per latent row."""
        return 2 ** (len(self.vae.config["dim_mult"]) - 1) * (self.vae.config["patch_size"] or 1)

    def strips(self, rows: float) -> Strips | None:
        """How frames of so many latent rows are split; None where one process computes alone."""
        if self.group is None or not self._split or self.vae.use_tiling:
            return None
        if rows < dist.get_world_size(self.group) or rows % 1:
            return None
        return Strips.of(int(rows), self.group)

    def run(self, part: nn.Module, rows: float, work: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """What `work` makes of whole frames or latents, on every process.

        Args:
            part: the encoder or the decoder, which `work` calls.
            rows: latent rows.
            given: whole frames or latents; `work` gets the rows of its process.
        """
        if self.group is None:
            return work(*given)
        strips = self.strips(rows)
        if strips is None:
            return self.team.broadcast(lambda: work(*given), self.device)
        with on_strips(part, strips):
            mine = work(*(strips.own(x) for x in given))
        return strips.whole(mine)


class SharedStream:
    """A `talkingdit.autoencoders.streaming.StreamingDecoder` on the processes of a team, each with its own caches.

    Both methods are called by all processes with the same arguments.
    """

    def __init__(self, autoencoder: Autoencoder):
        self._autoencoder = autoencoder
        self._decoder = StreamingDecoder(autoencoder.vae)

    def __call__(self, latents: Tensor) -> Tensor:
        """The next frames: see `StreamingDecoder.__call__`."""
        return self._autoencoder.run(self._autoencoder.vae.decoder, latents.shape[-2], self._decoder, latents)

    def resume(self, past: Tensor) -> None:
        """Go on behind latents that were decoded before: see `StreamingDecoder.resume`."""
        shared = self._autoencoder
        strips = shared.strips(past.shape[-2])
        if strips is not None:
            with on_strips(shared.vae.decoder, strips):
                self._decoder.resume(strips.own(past))
        elif shared.group is None:
            self._decoder.resume(past)
        else:
            shared.team.on_rank_0(lambda: self._decoder.resume(past))


class ClipDecoder:
    """The decoder of a video that is made clip by clip, which remembers the clips that it has decoded.

    Args:
        stream: with nothing decoded yet.
    """

    def __init__(self, stream: SharedStream):
        self._stream = stream
        self._next: int | None = None

    def get_ready(self, index: int, past: Tensor) -> None:
        """Go through the past of clip `index`, unless the clip before it was decoded last.

        Args:
            past: [1, C, k, H, W], the latents before the clip.
        """
        if self._next != index:
            self._stream.resume(past)
            self._next = index

    def behind(self, index: int, past: Tensor) -> SharedStream:
        """What decodes clip `index`; see `get_ready`."""
        self.get_ready(index, past)
        self._next = index + 1
        return self._stream
