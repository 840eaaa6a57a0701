# SPDX-License-Identifier: Apache-2.0
"""What a denoising step of Wan-S2V needs besides the noisy latents, and where its tokens are."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from talkingdit.families.wan_s2v.audio import FEATURES_PER_LATENT
from talkingdit.families.wan_s2v.sequence import SequenceShard
from talkingdit.nn.audio_cross_attention import ABSORB, AudioMemory
from talkingdit.nn.framepack import packed_segments
from talkingdit.ops import RopeLayout, Segment

KeyValue = tuple[Tensor, Tensor]
Packing = tuple[tuple[int, ...], str, str, int]


@dataclasses.dataclass(frozen=True)
class WanConditions:
    """Everything a denoising step needs that does not depend on the timestep, made by `WanS2VModel.encode_conditions`.

    N is the length of the whole sequence [noisy | reference | history], F latent frames, A audio tokens per frame. What
    belongs to tokens is there for those that this process holds (`share`): all of them without context parallelism. A
    packed sequence is a batch of one, with the frames of its clips behind each other and a text for each clip.
    """

    layout: RopeLayout  # places of all N tokens
    share: SequenceShard
    clean: tuple[Tensor, ...]  # per clip: reference and history tokens [B, n, dim]
    text: Tensor  # [B, L, dim]; packed: of the clips that have tokens here
    pose: tuple[Tensor | None, ...]  # per clip: [B, n, dim], added to the noisy tokens
    audio: Tensor | None = None  # [B, F, A, dim], of the frames that noisy tokens are in
    audio_modulation: tuple[KeyValue | None, ...] = ()  # per injection: shift, scale [B, F, dim]
    text_mask: Tensor | None = None  # bool [B, L]
    key_mask: Tensor | None = None  # bool [B, N]: false where a sample does not have a token
    text_kv: tuple[KeyValue, ...] | None = None  # per block: k, v [B, L, H, D]
    audio_kv: tuple[AudioMemory, ...] | None = None  # per injection

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, patch rows and patch columns of the video, where there is one."""
        return self.share.clips[0].grid


class WanInputs(TypedDict, total=False):
    """Conditions of `WanS2VModel` besides the text; what they are stands at `WanS2VModel.encode_conditions`."""

    reference: Tensor | None
    history: Tensor | None
    drop_history: bool | Sequence[bool] | Tensor
    drop_reference: bool | Sequence[bool] | Tensor
    add_last_motion: int
    pose: Tensor | None
    audio: Tensor | None
    audio_history: Tensor | None
    text_mask: Tensor | None
    lengths: Sequence[int] | Tensor | None
    history_lengths: Sequence[int] | Tensor | None
    size: tuple[int, int, int] | None
    precompute: bool


def sequence_layout(
    grid: tuple[int, int, int],
    head_dim: int,
    reference_time: float | None = None,
    past: int | Packing | None = None,
) -> RopeLayout:
    """Places of the sequence [noisy | reference | history].

    Args:
        grid: latent frames, patch rows and columns of the video.
        head_dim: channels per head; height and width get head_dim / 6 pairs each (rounded down), time the rest.
        reference_time: place of the reference in time, None where there is none.
        past: latent frames of a history that is not packed, or (buckets, drop_mode, padding, add_last_motion) of a
            `FramePacker`, or None.
    """
    if torch.compiler.is_compiling():
        frames, rows, columns = (operator.index(size) for size in grid)
        return _TracedLayout((frames, rows, columns), head_dim, reference_time, past)
    return _layout(grid, head_dim, reference_time, past)


@functools.lru_cache(maxsize=64)
def _layout(
    grid: tuple[int, int, int], head_dim: int, reference_time: float | None, past: int | Packing | None
) -> RopeLayout:
    frames, rows, columns = grid
    segments = [Segment(range(frames), range(rows), range(columns))]
    if reference_time is not None:
        segments.append(Segment([reference_time], range(rows), range(columns)))
    if isinstance(past, int):
        segments.append(Segment(range(-past, 0), range(rows), range(columns)))
    elif past is not None:
        buckets, drop_mode, padding, add_last = past
        segments += packed_segments(buckets, drop_mode, padding, 2 * rows, 2 * columns, add_last)
    return RopeLayout(segments, split=head_split(head_dim))


def head_split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, height and width."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@torch.compiler.assume_constant_result
def _length(*place: Any) -> int:
    return len(_layout(*place))


@torch.compiler.assume_constant_result
def _tables(device: torch.device, dtype: torch.dtype, *place: Any) -> tuple[Tensor, Tensor]:
    return _layout(*place).tables(device, dtype)


class _TracedLayout(RopeLayout):
    """A layout that the compiler can hold: its tables are constants of the graph, its sizes plain numbers."""

    def __init__(self, *place: Any):
        self.place = place
        self.split = head_split(place[1])
        self.pairs = [channels // 2 for channels in self.split]
        self.dim = sum(self.split)
        self.pairing = "interleaved"
        self.length = _length(*place)

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _tables(device, dtype, *self.place)


def dropped(name: str, drop: bool | Sequence[bool] | Tensor, batch: int, device: torch.device | str) -> bool | Tensor:
    """True or False where that holds for all samples and is known on the host, else a bool tensor [B]."""
    if isinstance(drop, bool):
        return drop
    if not isinstance(drop, Tensor):
        if len(drop) == batch and (all(drop) or not any(drop)):
            return bool(drop[0])
        drop = torch.tensor(list(drop), dtype=torch.bool)
    if drop.shape != (batch,) or drop.dtype != torch.bool:
        raise ValueError(
            f"WanS2VModel: {name} must be a bool or one bool per sample ({batch}), "
            f"got {drop.dtype} of shape {tuple(drop.shape)}"
        )
    return drop.to(device)


def present_frames(
    name: str, lengths: Sequence[int] | Tensor | None, batch: int, frames: int, device: torch.device | str
) -> Tensor | None:
    """bool [B, frames], true for the first `lengths` frames of each sample; None where all have all."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        if not all(0 <= length <= frames for length in lengths):
            raise ValueError(f"WanS2VModel: {name} must be numbers of frames up to {frames}, got {list(lengths)}")
        lengths = torch.tensor(list(lengths), dtype=torch.long)
    if lengths.shape != (batch,):
        raise ValueError(f"WanS2VModel: {name} must have one number per sample ({batch}), got {list(lengths.shape)}")
    return torch.arange(frames, device=device) < lengths.to(device)[:, None]


def key_mask(parts: Sequence[tuple[int, bool | Tensor]], batch: int, device: torch.device | str) -> Tensor | None:
    """Which tokens each sample has, bool [B, N]; None where every sample has all.

    Args:
        parts: number of tokens, and whether they are missing: False, per sample [B] or per frame [B, frames].
    """
    if all(gone is False for _, gone in parts):
        return None
    columns = []
    for count, gone in parts:
        if isinstance(gone, bool):
            kept = torch.ones(batch, 1, dtype=torch.bool, device=device)
        else:
            kept = ~gone if gone.dim() == 2 else ~gone[:, None]
        columns.append(kept.repeat_interleave(count // kept.shape[1], dim=1))
    return torch.cat(columns, dim=1)


def check_shape(name: str, value: Tensor | None, shape: Sequence[int | str]) -> None:
    """Does a tensor have this shape? Names stand for free sizes. None passes.

    Raises:
        ValueError: names the argument, the shape expected and the one that came.
    """
    if value is None:
        return
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(want) for want in shape)
        raise ValueError(f"WanS2VModel: {name} must have shape [{wanted}], got {list(value.shape)}")


def check_config(c: Any) -> None:
    """Checks the settings of a `WanS2VModel`.

    Raises:
        ValueError: names the setting that contradicts another.
    """
    if c.dim % c.num_heads or c.dim // c.num_heads % 2 or c.dim % 4:
        raise ValueError(
            f"WanS2VModel: dim must be a multiple of 4 and of num_heads with an even quotient, "
            f"got dim {c.dim} and num_heads {c.num_heads}"
        )
    if tuple(c.patch_size) != (1, 2, 2):
        raise ValueError(f"WanS2VModel: patch_size must be (1, 2, 2), got {tuple(c.patch_size)}")
    layers = list(c.audio_inject_layers)
    if layers != sorted(set(layers)) or (layers and not 0 <= layers[0] <= layers[-1] < c.num_layers):
        raise ValueError(
            f"WanS2VModel: audio_inject_layers must be ascending block numbers below {c.num_layers}, got {layers}"
        )
    if c.motion_frames[0] != 4 * c.motion_frames[1] - 3:
        raise ValueError(
            f"WanS2VModel: motion_frames must be (4 n - 3, n) pixel and latent frames, got {tuple(c.motion_frames)}"
        )
    if c.residual_dtype not in ("float32", "compute"):
        raise ValueError(f"WanS2VModel: residual_dtype must be 'float32' or 'compute', got {c.residual_dtype!r}")
    if c.audio_absorb not in ABSORB[:2]:
        raise ValueError(
            f"WanS2VModel: audio_absorb must be 'none' or 'value' (the model normalises its audio queries), "
            f"got {c.audio_absorb!r}"
        )


def check_latents(config: Any, latents: Tensor, timestep: Tensor) -> None:
    """Checks the shapes of noisy latents and their timesteps.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_shape("latents", latents, ("B", config.in_dim, "T", "H", "W"))
    batch, _, frames, height, width = latents.shape
    if height % 2 or width % 2:
        raise ValueError(f"WanS2VModel: latents must have even height and width, got {height} x {width}")
    if timestep.shape not in ((batch,), (batch, frames)):
        raise ValueError(
            f"WanS2VModel: timestep must have shape [B] = [{batch}] or [B, T] = [{batch}, {frames}], "
            f"got {list(timestep.shape)}"
        )


def clip_size(
    config: Any,
    text: Tensor,
    reference: Tensor | None,
    history: Tensor | None,
    pose: Tensor | None,
    audio: Tensor | None,
    audio_history: Tensor | None,
    text_mask: Tensor | None,
    size: tuple[int, int, int] | None,
) -> tuple[int, int, int]:
    """Checks the shapes of all conditions of `WanS2VModel.encode_conditions`; returns (T, H, W) of their latents.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_shape("text", text, ("B", "L", config.text_dim))
    batch, length = text.shape[:2]
    if length > config.text_len:
        raise ValueError(f"WanS2VModel: text must have at most text_len = {config.text_len} tokens, got {length}")
    frames, height, width = (None, None, None) if size is None else size
    for video in (pose, reference, history):
        if video is not None and height is None and video.dim() == 5:
            height, width = video.shape[3:]
    if frames is None and pose is not None and pose.dim() == 5:
        frames = pose.shape[2]
    if frames is None and audio is not None:
        frames = audio.shape[-1] // FEATURES_PER_LATENT
    if frames is None or height is None or width is None:
        raise ValueError("WanS2VModel: size = (T, H, W) of the latents must be given, the conditions do not tell it")
    if pose is not None and config.cond_dim == 0:
        raise ValueError("WanS2VModel: pose needs a model with cond_dim > 0, got a model with cond_dim = 0")
    check_shape("reference", reference, (batch, config.in_dim, 1, height, width))
    check_shape("history", history, (batch, config.in_dim, "Th", height, width))
    check_shape("pose", pose, (batch, config.cond_dim, frames, height, width))
    check_shape("text_mask", text_mask, (batch, length))
    if audio is not None and audio.dim() == 4 and audio.shape[3] != FEATURES_PER_LATENT * frames:
        raise ValueError(
            f"WanS2VModel: audio must have {FEATURES_PER_LATENT} features per latent frame, "
            f"{FEATURES_PER_LATENT * frames} for {frames} frames, got {audio.shape[3]}"
        )
    check_shape("audio", audio, (batch, config.audio_layers, config.audio_dim, FEATURES_PER_LATENT * frames))
    check_shape("audio_history", audio_history, (batch, config.audio_layers, config.audio_dim, "n"))
    return frames, height, width
