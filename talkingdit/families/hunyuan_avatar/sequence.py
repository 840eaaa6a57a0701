# SPDX-License-Identifier: Apache-2.0
"""Which tokens are where in the sequence of HunyuanVideo-Avatar, and which of them this process holds.

A sequence is one clip, or several packed behind each other: [reference | video | text] of each. Context parallelism
cuts it into contiguous shards, without regard to where clips, kinds of tokens or latent frames begin. The double blocks
treat image tokens (reference and video) and text apart: both are kept as sequences of their own there, in the same
order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from talkingdit.nn.audio_cross_attention import TokenSpan
from talkingdit.nn.ranges import Range

if TYPE_CHECKING:
    from talkingdit.nn.context_parallel import ContextParallel

# Clips in a packed sequence: each is a group of tokens with a modulation of its own, which the kernels tell apart.
MAX_CLIPS = 128


class ClipSpan(NamedTuple):
    """A clip in the sequence, from token `begin` on."""

    begin: int
    reference: int  # tokens of the reference image
    grid: tuple[int, int, int]  # latent frames, patch rows, patch columns of the video
    text: int  # tokens

    @property
    def per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def video(self) -> int:
        return self.grid[0] * self.per_frame

    @property
    def image(self) -> int:
        return self.reference + self.video

    @property
    def tokens(self) -> int:
        return self.image + self.text


@dataclass(frozen=True)
class SequenceShard:
    """The tokens of a sequence that this process holds, made by `sequence_shard`.

    Ranges are (begin, end) within what their name says, of every clip; empty where none of it is here.
    """

    begin: int  # of the process's tokens in the sequence
    end: int
    clips: tuple[ClipSpan, ...]
    reference: tuple[Range, ...]  # of the reference tokens
    video: tuple[Range, ...]  # of the video tokens
    text: tuple[Range, ...]  # of the text tokens
    frames: tuple[Range, ...]  # the latent frames that the video tokens here are in
    frame_spans: tuple[TokenSpan, ...]  # the video tokens here by latent frames, at least one span, maybe empty
    context: ContextParallel | None = None
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return self.clips[-1].begin + self.clips[-1].tokens

    @property
    def segments(self) -> list[int] | None:
        """Ends of the clips of a packed sequence, which do not attend to each other."""
        return self.ends("tokens") if self.packed else None

    def ends(self, kind: str) -> list[int]:
        """Ends of the clips in the sequence of all their "tokens", "image" tokens, "video" or "text"."""
        return list(itertools.accumulate(getattr(clip, kind) for clip in self.clips))

    def offset(self, kind: str) -> int:
        """Tokens of the kind in front of the first one here."""
        if kind == "image":
            return self.offset("reference") + self.offset("video")
        held: tuple[Range, ...] = getattr(self, kind)
        return sum(first for first, _ in held)

    @property
    def runs(self) -> list[tuple[bool, int]]:
        """Tokens here that are image (True) or text (False) by turns, and how many."""
        runs: list[tuple[bool, int]] = []
        for held in zip(self.reference, self.video, self.text, strict=True):
            reference, video, text = (last - first for first, last in held)
            runs += [(kind, count) for kind, count in ((True, reference + video), (False, text)) if count]
        return runs

    @property
    def video_ranges(self) -> list[Range]:
        """Where the video is among the image tokens here: at least one range, which may be empty."""
        ranges: list[Range] = []
        place = 0
        for (first, last), (begin, end) in zip(self.reference, self.video, strict=True):
            place += last - first
            if begin < end:
                if ranges and ranges[-1][1] == place:
                    ranges[-1] = ranges[-1][0], place + end - begin
                else:
                    ranges.append((place, place + end - begin))
            place += end - begin
        return ranges or [(0, 0)]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text tokens of the tokens here [B, n, ...]; views where they are contiguous."""
        runs = self.runs
        parts = x.split([count for _, count in runs], dim=1) if runs else ()
        image = [part for part, (is_image, _) in zip(parts, runs, strict=True) if is_image]
        text = [part for part, (is_image, _) in zip(parts, runs, strict=True) if not is_image]
        return _together(image, x), _together(text, x)

    def join(self, image: Tensor, text: Tensor) -> Tensor:
        """The inverse of `split`."""
        parts, used = [], {True: 0, False: 0}
        for is_image, count in self.runs:
            begin = used[is_image]
            parts.append((image if is_image else text)[:, begin : begin + count])
            used[is_image] = begin + count
        # A part without tokens stays in the graph: its layers must get their (empty) gradients on every process.
        if torch.is_grad_enabled() or not parts:
            parts += [image[:, :0], text[:, :0]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _together(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts), dim=1) if parts else like[:, :0]


def sequence_shard(
    clips: Sequence[ClipSpan], context: ContextParallel | None = None, packed: bool = False
) -> SequenceShard:
    """The shard of this process: everything without a context.

    Args:
        clips: of the sequence, in order and without gaps.
        context: see `talkingdit.nn.context_parallel`.
        packed: the clips are samples of their own, of a batch of one.
    """
    tokens = clips[-1].begin + clips[-1].tokens
    begin, end = (0, tokens) if context is None else context.shard(tokens)

    def held(first: int, count: int) -> Range:
        return min(max(begin - first, 0), count), min(max(end - first, 0), count)

    video = tuple(held(clip.begin + clip.reference, clip.video) for clip in clips)
    frames, spans = _frames_of(clips, video)
    return SequenceShard(
        begin=begin,
        end=end,
        clips=tuple(clips),
        reference=tuple(held(clip.begin, clip.reference) for clip in clips),
        video=video,
        text=tuple(held(clip.begin + clip.image, clip.text) for clip in clips),
        frames=frames,
        frame_spans=spans,
        context=context,
        packed=packed,
    )


def _frames_of(clips: Sequence[ClipSpan], video: Sequence[Range]) -> tuple[tuple[Range, ...], tuple[TokenSpan, ...]]:
    """`frames` and `frame_spans` of a shard that holds these video tokens of its clips."""
    frames: list[Range] = []
    spans: list[TokenSpan] = []
    for clip, (first, last) in zip(clips, video, strict=True):
        if first == last:
            frames.append((0, 0))
            continue
        frames.append((first // clip.per_frame, -(-last // clip.per_frame)))
        span = TokenSpan(last - first, frames[-1][1] - frames[-1][0], clip.per_frame, first % clip.per_frame)
        if spans and spans[-1].tokens_per_frame == clip.per_frame:  # it ended with its clip, so with a whole frame
            tail = spans.pop()
            span = TokenSpan(tail.tokens + span.tokens, tail.frames + span.frames, clip.per_frame, tail.token_offset)
        spans.append(span)
    if not spans:  # modules must run all the same, or their weights would get no gradient here
        frames[0], spans = (0, 1), [TokenSpan(0, 1, clips[0].per_frame)]
    return tuple(frames), tuple(spans)


def tokens_of(config: Mapping[str, Any], frames: int, height: int, width: int, reference: bool, text: int = 0) -> int:
    """Tokens of a clip in the sequence of a `HunyuanAvatarModel`, for budgets.

    Args:
        config: of the model.
        frames, height, width: of the latents; height and width even.
        reference: with a reference image.
        text: tokens of the text.
    """
    images = frames + (reference and config.get("reference_tokens", True))
    return images * (height // 2) * (width // 2) + text
