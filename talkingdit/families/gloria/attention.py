# SPDX-License-Identifier: Apache-2.0
"""How much a video looks at each anchor, over time (the paper's figures 9 and 10): measured on request, and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talkingdit import ops
from talkingdit.atomic import write_whole
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.blocks import BlockInputs
from talkingdit.nn.layers import lend

if TYPE_CHECKING:
    from types import TracebackType

    from talkingdit.families.gloria.pipeline import GloriaConditions
    from talkingdit.families.wan_i2v.model import WanI2VModel

QUERIES = 64  # tokens of a latent frame that are asked; evenly spread


class AnchorAttention:
    """While it is entered, the blocks of a model say how much of their self-attention goes to each anchor.

    Softmax weights of all keys, summed over the tokens of an anchor; the mean over heads, over some queries of a latent
    frame, over blocks, steps and samples of the first prediction. Only without context parallelism, where a process
    has all keys.

    Args:
        model: whose blocks are watched.
        conditions: of the video, with its anchors as extra tokens.
    """

    def __init__(self, model: WanI2VModel, conditions: GloriaConditions):
        self._model = model
        self._counts = [extra.tokens for extra in conditions.extra]
        self._sum: Tensor | None = None
        self._times = 0
        self._timestep: float | None = None
        self._first = False  # prediction of a step
        self._hooks: list[Any] = []

    def __enter__(self) -> AnchorAttention:
        self._hooks = [
            block.self_attn.register_forward_pre_hook(self._watch)  # type: ignore[union-attr]
            for block in self._model.blocks
        ]
        self._hooks.append(self._model.register_forward_pre_hook(self._begin))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def weights(self) -> Tensor | None:
        """[anchors, latent frames] in 0..1; None where they could not be seen."""
        return None if self._sum is None else self._sum / self._times

    def _begin(self, model: Any, given: tuple[Tensor, ...]) -> None:
        """Predictions of a step may come one after the other: all but the first find its timestep."""
        timestep = float(given[1].max())
        self._first, self._timestep = timestep != self._timestep, timestep

    @torch.no_grad()
    def _watch(self, attention: Any, given: tuple[Tensor, BlockInputs]) -> None:
        x, inputs = given
        shard = inputs.shard
        assert shard is not None
        if shard.context is not None or not self._first:
            return
        q, k = (linear(x)[:1].unflatten(-1, (attention.num_heads, -1)) for linear in (attention.q, attention.k))
        weights = lend(attention.norm_q)[0], lend(attention.norm_k)[0]
        q, k = ops.qk_norm_rope3d(q, k, *weights, inputs.layout, eps=attention.eps)
        frames, per_frame = shard.clips[0].grid[0], shard.clips[0].per_frame
        found = []
        for frame in range(frames):
            asked = torch.linspace(0, per_frame - 1, min(QUERIES, per_frame)).long() + frame * per_frame
            found.append(self._shares(q[0, asked], k[0]))
        whole = torch.stack(found, dim=1).cpu()
        self._sum = whole if self._sum is None else self._sum + whole
        self._times += 1

    def _shares(self, q: Tensor, k: Tensor) -> Tensor:
        """[anchors] of queries [n, H, D] and all keys [N, H, D], of which the last are those of the anchors."""
        scores = torch.einsum("nhd,mhd->hnm", q.float(), k.float()) * q.shape[-1] ** -0.5
        weights = scores.softmax(-1).mean((0, 1))[k.shape[0] - sum(self._counts) :]
        return torch.stack([part.sum() for part in weights.split(self._counts)])


def draw_figure(path: Path, weights: Tensor | None, names: Sequence[str], fps: float) -> None:
    """Write a PNG: a line per anchor, over the seconds of the video, with the numbers in a .csv beside it.

    Args:
        weights: [anchors, latents]; None where they could not be seen.
        names: of the anchors.
        fps: frames per second; a latent is four frames.

    Raises:
        UserError: the disk is full, or a file cannot be written.
    """
    from talkingdit.media.lines import line_chart

    if weights is None or not names:
        return
    seconds = [0.0, *((4 * k - 1.5) / fps for k in range(1, weights.shape[1]))]
    rows = [",".join(["seconds", *names])]
    rows += [
        ",".join([f"{time:.4f}", *(f"{value:.6f}" for value in column)])
        for time, column in zip(seconds, weights.T.tolist(), strict=True)
    ]
    numbers = path.with_suffix(".csv")
    try:
        write_whole(numbers, ("\n".join(rows) + "\n").encode())
    except OSError as error:
        raise UserError(f"{numbers}: cannot be written ({error.strerror or error}).") from error
    curves = {name: row.numpy() for name, row in zip(names, weights, strict=True)}
    line_chart(curves, seconds, "share of self-attention that goes to each anchor", path)
