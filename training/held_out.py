# SPDX-License-Identifier: Apache-2.0
"""The loss on clips that are never trained on, at fixed noise levels with fixed noise: curves that compare.

Which clips of a source are held out follows from the names of its videos alone, and the noise of a clip from its own
name: not from the seed of the run, its batches or its layout. So two runs on the same data are measured on the same
numbers, and one run on any number of processes.
"""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from talkingdit.data.sample import BrokenSample, ClipRequest, Sample, Source, flaw, group_of
from talkingdit.distributed.team import from_all_ranks
from talkingdit.errors import UserError
from training.conditions import Draws, normal, present
from training.networks import Networks
from training.objective import assemble, errors_of
from training.parallel import ProcessMesh
from training.sections import HeldOutConfig, StageConfig

logger = logging.getLogger(__name__)

SEED = 20250827  # of the noise, the same in every run
PREFIX = "held_out/"


def held_items(sources: Mapping[str, Source], config: HeldOutConfig) -> dict[str, frozenset[int]]:
    """Items that no stage may draw, by source.

    Of a source that is held out as a whole all, of others the `share` of the videos whose names have the smallest
    checksums (one or more): a video stays held out however many others come to the source.

    Raises:
        UserError: nothing would be left of a source to train on.
    """
    found = {}
    for name, source in sources.items():
        if name in config.sources:
            found[name] = frozenset(range(len(source)))
        elif config.share > 0:
            found[name] = _share_of(name, source, config.share)
    return found


def _share_of(name: str, source: Source, share: float) -> frozenset[int]:
    videos = defaultdict(list)
    for index in range(len(source)):
        videos[group_of(source, index)].append(index)
    order = sorted(videos, key=lambda video: (_hash(video), video))
    chosen = [video for video in order if _hash(video) < share * 2**32] or order[:1]
    if len(chosen) == len(order):
        raise UserError(
            f"held_out.share: {share:g} of the {len(order)} videos of source {name!r} leaves none to train on; take "
            "a smaller share, or name a source of their own in held_out.sources."
        )
    return frozenset(index for video in chosen for index in videos[video])


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


@dataclass
class HeldOut:
    """Measures the loss on held-out clips. Every rank has one and calls it at the same steps.

    Args:
        sources: by name.
        items: held out, by source, see `held_items`.
        config: how many clips at most, and at which noise levels.
        clip_latents: latent frames of a clip at most.
    """

    sources: Mapping[str, Source]
    items: Mapping[str, frozenset[int]]
    config: HeldOutConfig
    clip_latents: int
    _clips: list[tuple[str, int]] | None = None  # source and item of those that can be read
    _read: dict[int, Sample] = field(default_factory=dict)  # of this rank, by place in that list

    def chosen(self) -> list[tuple[str, int]]:
        """Source and item of the clips that are measured: of every source in turn, in an order of its own."""
        queues = [
            [(name, i) for i in sorted(items, key=lambda i: (_hash(f"{group_of(self.sources[name], i)}/{i}"), i))]
            for name, items in sorted(self.items.items())
        ]
        turns = max(map(len, queues), default=0)
        return [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][: self.config.clips]

    def _read_one(self, name: str, index: int) -> Sample:
        source, group = self.sources[name], group_of(self.sources[name], index)
        frames = min(source.shape(index).frames, self.clip_latents)
        try:
            sample = source.sample(index, np.random.default_rng((SEED, _hash(group))), ClipRequest(frames))
        except BrokenSample:
            raise
        except Exception as error:  # as in `training.reading`
            raise BrokenSample(f"{name}[{index}]", f"{type(error).__name__}: {error}") from error
        wrong = flaw(sample)
        if wrong is not None:
            raise BrokenSample(f"{name}[{index}] ({sample.key})", wrong)
        return sample

    def _open(self, mesh: ProcessMesh) -> list[tuple[str, int]]:
        """Read this rank's clips; what any rank cannot read is left out on all."""
        if self._clips is not None:
            return self._clips
        chosen = self.chosen()
        read: dict[int, Sample] = {}
        broken: dict[int, str] = {}
        for place in range(mesh.data_rank, len(chosen), mesh.data_size):
            try:
                read[place] = self._read_one(*chosen[place])
            except BrokenSample as error:
                broken[place] = str(error)
        lost = {place: reason for part in from_all_ranks(broken) for place, reason in part.items()}
        if mesh.rank == 0:
            for _, reason in sorted(lost.items()):
                logger.warning("held_out: broken sample left out: %s", reason)
        places = [place for place in range(len(chosen)) if place not in lost]
        if not places:
            first = next(iter(lost.values()), "there are none")
            raise UserError(f"held_out: expected clips that can be read, got none; first: {first}.")
        self._clips = [chosen[place] for place in places]
        # Left out ones move the others to other ranks.
        for new in {*range(mesh.data_rank, len(places), mesh.data_size), 0}:
            old = places[new]
            self._read[new] = read[old] if old in read else self._read_one(*chosen[old])
        return self._clips

    @torch.no_grad()
    def measure(self, networks: Networks, stage: StageConfig, mesh: ProcessMesh) -> dict[str, float]:
        """Mean losses over the clips, by noise level and of all; a collective call, the same result on every rank.

        Clips keep all their conditions, cells count alike, and no weighting by noise level applies.

        Args:
            networks: in evaluation mode, with the weights to measure.
            stage: whose conditions say what a clip hears of before and what an empty prompt is.
        """
        count = len(self._open(mesh))
        mine: dict[tuple[int, float], float] = {}
        for begin in range(0, count, mesh.data_size):
            place = begin + mesh.data_rank
            counts = place < count
            for level in self.config.levels:  # every rank takes part in every forward, whether it counts or not
                loss = self._loss(networks, self._read[place if counts else 0], level, stage, mesh)
                if counts:
                    mine[place, level] = loss
        losses = {key: loss for part in reversed(from_all_ranks(mine)) for key, loss in part.items()}
        return _means(losses, self.config.levels, count)

    def _loss(self, networks: Networks, sample: Sample, level: float, stage: StageConfig, mesh: ProcessMesh) -> float:
        number = _hash(sample.key)
        noise = normal(SEED, number, f"held out {level:g}", sample.latents.shape)
        draws = Draws(number, level, frozenset(present(sample)), history_noise=0.0, prefix=0, weighted=False)
        item = assemble(sample, draws, noise, stage, SEED)
        return float(errors_of(networks, [item], stage, mesh, packed=False)[0])


def _means(losses: Mapping[tuple[int, float], float], levels: Sequence[float], count: int) -> dict[str, float]:
    by_level = {level: sum(losses[place, level] for place in range(count)) / count for level in levels}
    return {
        f"{PREFIX}loss": sum(by_level.values()) / len(by_level),
        **{f"{PREFIX}noise_{level:g}": loss for level, loss in by_level.items()},
    }
