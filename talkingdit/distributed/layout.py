# SPDX-License-Identifier: Apache-2.0
"""How several processes make one video: three ways to share the work, which go together.

    guidance    the predictions with and without conditions on different processes; velocities are all they exchange
    ulysses     the heads of attention on different processes, the tokens of everything else (arXiv:2309.14509)
    ring        tokens on different processes, also in attention (arXiv:2310.01889)
    vae         the autoencoder with some rows of the frame on every process

guidance x ring x ulysses is the number of processes. The autoencoder's work is split over all of them. This is the
unified sequence parallelism (arXiv:2405.07719) of SkyReels-Audio (arXiv:2506.00830, table 4), with guidance and
autoencoder besides.

Every process holds the whole model and ends every step with the same latents to the last bit: velocities, decoded
frames and noise come to all from one place. The result is that of one process to the rounding of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from talkingdit.distributed.team import ALONE, Team, gather
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from talkingdit.nn.context_parallel import ContextParallel

T = TypeVar("T")
AXES = ("guidance", "ring", "ulysses")  # from the slowest network to the fastest
VAE = ("split", "one")


@dataclass(frozen=True)
class Layout:
    """How the work is shared; None is chosen by `resolved`."""

    guidance: int | None = None
    ulysses: int | None = None
    ring: int | None = None
    vae: str | None = None

    @staticmethod
    def parse(text: str) -> Layout:
        """A layout in words: "ulysses=4,ring=2,guidance=2,vae=split", any of them.

        Raises:
            UserError: an unknown word or a value that is none.
        """
        values: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = item.partition("=")
            if name == "vae":
                if value not in VAE:
                    raise UserError(f"--parallel: vae must be one of {', '.join(VAE)}, got {value!r}.")
                values[name] = value
            elif name in AXES:
                if not value.isdecimal() or not int(value):
                    raise UserError(f"--parallel: {name} must be an integer of at least 1, got {value!r}.")
                values[name] = int(value)
            else:
                raise UserError(f"--parallel: the words are guidance, ulysses, ring and vae, got {name!r}.")
        return Layout(**values)

    def resolved(self, world: int, branches: int, heads: int | None) -> Layout:
        """The layout without gaps for a number of processes.

        Where nothing is said: guidance takes as many processes as make its shares equal, Ulysses as many as the heads
        allow, for it moves the fewest bytes, and the ring the rest. Where some numbers are said, the others are 1.

        Args:
            world: processes.
            branches: predictions per step.
            heads: heads of the model's attention; None where that is not known yet.

        Raises:
            UserError: the numbers do not fit together.
        """
        vae = self.vae or "split"
        if self.guidance is self.ulysses is self.ring is None:
            guidance = math.gcd(branches, world)
            ulysses = math.gcd(heads or 0, world // guidance)
            return Layout(guidance, ulysses, world // guidance // ulysses, vae)
        chosen = Layout(self.guidance or 1, self.ulysses or 1, self.ring or 1, vae)
        guidance, ulysses, ring = chosen.shape[0], chosen.shape[2], chosen.shape[1]
        needed = guidance * ulysses * ring
        if needed != world:
            how = f"torchrun --nproc-per-node {needed} -m talkingdit generate ..."
            raise UserError(
                f"--parallel: guidance={guidance}, ulysses={ulysses} and ring={ring} are for {needed} processes, got "
                f"{world}" + (f"; start with `{how}`." if world == 1 else ".")
            )
        if heads is not None and heads % ulysses:
            raise UserError(f"--parallel: ulysses must divide the {heads} heads of this model, got {ulysses}.")
        if guidance > branches:
            raise UserError(
                f"--parallel: guidance must be at most the number of predictions per step, {branches}, got {guidance}."
            )
        return chosen

    @property
    def shape(self) -> tuple[int, int, int]:
        """Processes per axis, in the order of AXES."""
        assert self.guidance is not None
        assert self.ring is not None
        assert self.ulysses is not None
        return self.guidance, self.ring, self.ulysses

    def __str__(self) -> str:
        """The words that `parse` reads."""
        words = {name: getattr(self, name) for name in ("guidance", "ulysses", "ring", "vae")}
        return ",".join(f"{name}={value}" for name, value in words.items() if value is not None)


class Parallel:
    """What a process knows of its share. Without arguments: it does everything.

    Args:
        team: all processes.
        layout: from `Layout.resolved`.
        device: where tensors are exchanged, of the model.
    """

    def __init__(self, team: Team = ALONE, layout: Layout | None = None, device: torch.device | str = "cpu"):
        self.team = team
        self.layout = Layout(1, 1, 1, "one") if layout is None else layout
        self.context: ContextParallel | None = None  # of the model's calls
        self._guidance: dist.ProcessGroup | None = None
        self._share = 0
        if team.size == 1:
            return
        guidance, ring, ulysses = self.layout.shape
        mesh = dist.init_device_mesh(torch.device(device).type, self.layout.shape, mesh_dim_names=AXES)
        if ring * ulysses > 1:
            from talkingdit.nn.context_parallel import ContextParallel

            self.context = ContextParallel.from_mesh(mesh["ring", "ulysses"])
        if guidance > 1:
            self._guidance = mesh["guidance"].get_group()
            self._share = mesh["guidance"].get_local_rank()

    def own(self, branches: Sequence[T]) -> Sequence[T]:
        """The predictions of a step that this process makes."""
        begin, end = self._part(len(branches), self._share)
        return branches[begin:end]

    def exchange(self, predictions: Tensor, count: int) -> Tensor:
        """All predictions of a step, on every process.

        Args:
            predictions: [k, C, T, H, W], those that `own` gave.
            count: of all.

        Returns:
            [count, C, T, H, W].
        """
        if self._guidance is None:
            return predictions
        groups = self.layout.shape[0]
        sizes = [end - begin for begin, end in (self._part(count, group) for group in range(groups))]
        longest = max(sizes)  # gloo wants equal sizes
        mine = predictions.new_zeros(longest, *predictions.shape[1:])
        mine[: len(predictions)] = predictions
        everything = gather(mine, self._guidance).split(longest)
        return torch.cat([all_of[:size] for all_of, size in zip(everything, sizes, strict=True)])

    def _part(self, count: int, group: int) -> tuple[int, int]:
        """Begin and end of what a group makes of so many predictions."""
        groups = self.layout.shape[0]
        return count * group // groups, count * (group + 1) // groups
