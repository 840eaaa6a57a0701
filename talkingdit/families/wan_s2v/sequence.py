# SPDX-License-Identifier: Apache-2.0
"""Which tokens are where in the sequence of Wan-S2V, and which of them this process holds.

A sequence is one clip, or several packed behind each other: [noisy | reference | history] of each. Context parallelism
cuts it into contiguous shards, without regard to where clips, kinds of tokens or latent frames begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from talkingdit.nn.audio_cross_attention import TokenSpan
from talkingdit.nn.framepack import packed_tokens
from talkingdit.nn.ranges import Range

if TYPE_CHECKING:
    from talkingdit.nn.context_parallel import ContextParallel

NOISY, REFERENCE, HISTORY = range(3)  # kinds of tokens, each with an embedding of its own


class ClipSpan(NamedTuple):
    """A clip in the sequence: its noisy tokens from `begin` on, then its reference and history, `tokens` in all."""

    begin: int
    grid: tuple[int, int, int]  # latent frames, patch rows, patch columns
    tokens: int

    @property
    def per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def noisy(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class SequenceShard:
    """The tokens of a sequence that this process holds, made by `sequence_shard`.

    Ranges are (begin, end). "Local" counts from the first token that the process holds.
    """

    begin: int  # of the process's tokens in the sequence
    end: int
    tokens: int  # of the whole sequence
    clips: tuple[ClipSpan, ...]
    clip_noisy: tuple[Range, ...]  # per clip, the range of its noisy tokens that is here
    clip_clean: tuple[Range, ...]  # per clip, the range of its other tokens that is here
    clip_frames: tuple[Range, ...]  # per clip, the latent frames of the noisy tokens that are here
    noisy_offset: int  # noisy tokens of the sequence in front of the first one here
    noisy_ranges: tuple[Range, ...]  # local: where noisy tokens are, at least one range, which may be empty
    frame_spans: tuple[TokenSpan, ...]  # the same tokens by latent frames, at least one, which may be empty
    local_clips: Range  # the clips that have tokens here, at least one
    clip_ranges: tuple[Range, ...]  # local: the tokens of each of the local clips
    context: ContextParallel | None = None
    packed: bool = False

    @property
    def segments(self) -> list[int] | None:
        """Ends of the clips of a packed sequence, which do not attend to each other."""
        return [clip.begin + clip.tokens for clip in self.clips] if self.packed else None


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

    clip_noisy = [held(clip.begin, clip.noisy) for clip in clips]
    clip_frames, noisy_ranges, frame_spans = _noisy_parts(clips, clip_noisy, begin)
    whole = [held(clip.begin, clip.tokens) for clip in clips]
    local = [i for i, (first, last) in enumerate(whole) if first < last] or [0]
    return SequenceShard(
        begin=begin,
        end=end,
        tokens=tokens,
        clips=tuple(clips),
        clip_noisy=tuple(clip_noisy),
        clip_clean=tuple(held(clip.begin + clip.noisy, clip.tokens - clip.noisy) for clip in clips),
        clip_frames=tuple(clip_frames),
        noisy_offset=sum(first for first, _ in clip_noisy),
        noisy_ranges=tuple(noisy_ranges),
        frame_spans=tuple(frame_spans),
        local_clips=(local[0], local[-1] + 1),
        clip_ranges=tuple(
            (clip.begin + first - begin, clip.begin + last - begin) if first < last else (0, 0)
            for clip, (first, last) in zip(clips, whole, strict=True)
        )[local[0] : local[-1] + 1],
        context=context,
        packed=packed,
    )


def _noisy_parts(
    clips: Sequence[ClipSpan], clip_noisy: Sequence[Range], begin: int
) -> tuple[list[Range], list[Range], list[TokenSpan]]:
    """`clip_frames`, `noisy_ranges` and `frame_spans` of the shard that begins there."""
    frames: list[Range] = []
    ranges: list[Range] = []
    spans: list[TokenSpan] = []
    for clip, (first, last) in zip(clips, clip_noisy, strict=True):
        if first == last:
            frames.append((0, 0))
            continue
        frames.append((first // clip.per_frame, -(-last // clip.per_frame)))
        local = clip.begin + first - begin
        if ranges and ranges[-1][1] == local:
            local, _ = ranges.pop()
        ranges.append((local, clip.begin + last - begin))
        span = TokenSpan(last - first, frames[-1][1] - frames[-1][0], clip.per_frame, first % clip.per_frame)
        if spans and spans[-1].tokens_per_frame == clip.per_frame:  # it ended with its clip, so with a whole frame
            tail = spans.pop()
            span = TokenSpan(tail.tokens + span.tokens, tail.frames + span.frames, clip.per_frame, tail.token_offset)
        spans.append(span)
    if not spans:  # modules must run all the same, or their weights would get no gradient here
        frames[0] = (0, 1)
        ranges, spans = [(0, 0)], [TokenSpan(0, 1, clips[0].per_frame)]
    return frames, ranges, spans


def tokens_of(
    config: Mapping[str, Any], frames: int, height: int, width: int, reference: bool, history: bool | int
) -> int:
    """Tokens of a clip in the sequence of a `WanS2VModel`, for budgets.

    Args:
        config: of the model.
        frames, height, width: of the latents; height and width even.
        reference: with a reference image.
        history: with a history; where the model does not pack it, its latent frames.
    """
    rows, columns = height // 2, width // 2
    total = (frames + bool(reference)) * rows * columns
    if not config["enable_framepack"]:
        return total + int(history) * rows * columns
    if not history:
        return total
    return total + packed_tokens(
        config.get("zip_frame_buckets", (1, 2, 16)),
        config.get("framepack_drop_mode", "padd"),
        config.get("framepack_padding", "none"),
        height,
        width,
        2 if config.get("add_last_motion", True) else 0,
    )
