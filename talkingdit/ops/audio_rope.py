# SPDX-License-Identifier: Apache-2.0
"""Audio attention with rotary time: video time on the queries, audio time on the keys, in the same pass over the video.

With R(t) the rotation of a place t in time, a video token of frame f and an audio token of time a score

    (R(t_f) q) . (R(t_a) k)  =  q . (R(t_a - t_f) k)

as rotations are orthogonal and follow one another by adding angles. All video tokens of a latent frame have one time,
so the rotation of many thousand queries is one of the few keys that their frame hears, by how much later than the frame
they sound. The queries are read once, by `audio_attention`, and not rotated at all: the rotation takes no pass of its
own, and no kernel needs to know of it. Angles are small then, too, wherever in a long video the frame is.

Keys are rotated once per frame that hears them, so every frame has its own copy of those that it shares with others:
`heard_tokens` says which.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from talkingdit.ops._rope_layout import RopeLayout, Segment
from talkingdit.ops.audio_attention import audio_attention, audio_attention_reference
from talkingdit.ops.rope3d import rope3d, rope3d_reference

__all__ = [
    "HeardTokens",
    "audio_rope_attention",
    "audio_rope_attention_reference",
    "audio_rope_layout",
    "heard_tokens",
]


class HeardTokens(NamedTuple):
    """Which of the audio tokens [F, A] of a clip each of its F frames hears: K of them, the first `lens` are valid."""

    tokens: Tensor  # int64 [F, K] in 0 .. F A - 1
    positions: Tensor  # float64 [F, K], of the token minus that of the middle of the frame, in tokens
    lens: Tensor  # int64 [F]


@functools.lru_cache(maxsize=64)
def heard_tokens(frames: int, per_frame: int, window: int | None = None) -> HeardTokens:
    """The tokens of the frames within `window` of each frame, those of all frames where it is None; on the host.

    Args:
        frames: F latent frames of the clip.
        per_frame: A audio tokens of each, evenly spaced.
        window: frames on each side; frames beyond the ends of the clip do not exist.

    Raises:
        ValueError: fewer than one frame or token, or a window under 0.
    """
    if frames < 1 or per_frame < 1 or (window is not None and window < 0):
        raise ValueError(
            "heard_tokens: frames and per_frame must be at least 1 and window at least 0, "
            f"got {frames}, {per_frame} and {window}"
        )
    reach = frames - 1 if window is None else min(window, frames - 1)
    frame = torch.arange(frames)
    first, last = (frame - reach).clamp(min=0), (frame + reach).clamp(max=frames - 1)
    lens = (last - first + 1) * per_frame
    slot = torch.arange(int(lens.max()))
    # What lies behind the valid ones repeats the last of them, so that its place is a place.
    index = first[:, None] * per_frame + torch.minimum(slot, lens[:, None] - 1)
    middle = frame.double() * per_frame + (per_frame - 1) / 2
    return HeardTokens(index, index.double() - middle[:, None], lens)


@functools.lru_cache(maxsize=64)
def _layout(positions: tuple[float, ...], dim: int, theta: float) -> RopeLayout:
    return RopeLayout([Segment(positions)], split=(dim,), theta=theta)


def audio_rope_layout(positions: Tensor, dim: int, theta: float = 10000.0) -> RopeLayout:
    """How keys of these positions, float [F, A] on the host, are turned: what a compiled graph is given of them.

    Args:
        dim: channels of a head, even.
        theta: base of the frequencies.
    """
    return _layout(tuple(positions.double().flatten().tolist()), dim, float(theta))


def _key_layout(name: str, k: Tensor, positions: Tensor | RopeLayout, theta: float) -> RopeLayout:
    if k.dim() != 5:
        raise ValueError(f"{name}: k must be [B, F, A, H, D], got shape {tuple(k.shape)}")
    if isinstance(positions, RopeLayout):
        return positions
    if tuple(positions.shape) != tuple(k.shape[1:3]):
        raise ValueError(
            f"{name}: positions must have shape [F, A] = {tuple(k.shape[1:3])}, got {tuple(positions.shape)}"
        )
    if positions.device.type != "cpu":
        raise ValueError(f"{name}: positions must be on the host, got {positions.device}")
    return audio_rope_layout(positions, k.shape[4], theta)


def audio_rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | RopeLayout,
    tokens_per_frame: int,
    token_offset: int = 0,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    theta: float = 10000.0,
) -> Tensor:
    """`audio_attention` of queries with the time of their frame and keys with their own time (SkyReels-Audio, 2.2).

    Args:
        q: [B, N, H, D], not rotated; D even.
        k, v: [B, F, A, H, D], what each frame hears, see `heard_tokens`.
        positions: float [F, A] on the host: time of each audio token minus that of its frame, in any unit. Or the
            `audio_rope_layout` of such.
        tokens_per_frame, token_offset, kv_lens, scale: as of `audio_attention`.
        theta: base of the frequencies; channels (2 i, 2 i + 1) turn by position * theta ** (-2 i / D).

    Returns:
        [B, N, H, D] in the dtype of q. Gradients of q, k and v are deterministic.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or the token range do not fit.
    """
    layout = _key_layout("audio_rope_attention", k, positions, theta)
    turned = rope3d(k.flatten(1, 2), layout).unflatten(1, k.shape[1:3])
    return audio_attention(q, turned, v, tokens_per_frame, token_offset, kv_lens=kv_lens, scale=scale)


def audio_rope_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    tokens_per_frame: int,
    token_offset: int = 0,
    kv_lens: Tensor | None = None,
    scale: float | None = None,
    theta: float = 10000.0,
    start: float = 0.0,
) -> Tensor:
    """:func:`audio_rope_attention` as the paper has it: queries and keys are both rotated, from time `start` on."""
    _key_layout("audio_rope_attention_reference", k, positions, theta)
    times = start + torch.arange(k.shape[1], dtype=torch.float64) * k.shape[2]
    video = RopeLayout([Segment(times, range(tokens_per_frame))], split=(q.shape[3],), theta=theta)
    audio = RopeLayout([Segment((positions.double() + times[:, None]).flatten())], split=(q.shape[3],), theta=theta)
    q = rope3d_reference(q, video, token_offset)
    k = rope3d_reference(k.flatten(1, 2), audio).unflatten(1, k.shape[1:3])
    return audio_attention_reference(q, k, v, tokens_per_frame, token_offset, kv_lens=kv_lens, scale=scale)
