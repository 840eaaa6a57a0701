# SPDX-License-Identifier: Apache-2.0
"""Reads what was planned: worker processes decode, broken samples are left out, the state is the plan's.

The plan of a step is made in the main process and does not depend on ranks or workers; workers only turn planned
samples into tensors. So a state is the few counters with which the next plan begins, equal on every rank, and a run
goes on with any other number of ranks and workers. That is why torch's DataLoader is used here and not torchdata's
StatefulDataLoader: its state belongs to each worker, and it refuses another number of them.
"""

from __future__ import annotations

import logging
import sys
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from talkingdit.data.sample import BrokenSample, Sample, Shape, Source, group_of
from talkingdit.errors import UserError
from training.batching import ATTENTION_TOKENS, Group, MicroBatch, Planned, Planner, StepPlan
from training.buckets import Buckets, CountTokens, Fit, patches
from training.reading import Parcel, Reader, sigterm_held, start_worker
from training.sampler import ItemStream, Sampler, stream_shares
from training.sections import StageConfig, at

logger = logging.getLogger(__name__)

REASONS = 5  # first reasons of broken samples that are logged and kept, per source
WINDOW, ENOUGH, MOST = 1000, 200, 0.5  # of the last WINDOW samples, once ENOUGH were read, at most MOST may be broken
TRIES = 256  # samples tried to stand in for a micro-batch that is broken altogether


@dataclass
class Broken:
    """Samples of a source that could not be read by this process."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)  # the first few


def _same(value: Any) -> Any:
    return value


def _cuts(source: Source, shape: Shape) -> bool:
    """Whether a source cuts clips from longer videos: clips that begin one and clips that go on can be asked for."""
    return getattr(source, "cuts", shape.resizable)


class _Catalogue:
    """What a stage can draw: usable items of its sources by stream, and the clip that each is trained with."""

    def __init__(
        self, sources: Mapping[str, Source], stage: StageConfig, buckets: Buckets, held: Mapping[str, frozenset[int]]
    ) -> None:
        self.sources, self.stage, self.buckets, self.held = sources, stage, buckets, held
        self.contents: dict[str, list[int]] = {}  # by source: how many items, and a checksum of what they are
        self.streams = [stream for name, source in sources.items() for stream in self._sort(name, source)]
        self._by_name = {stream.name: stream for stream in self.streams}

    def _sort(self, name: str, source: Source) -> list[ItemStream]:
        """Streams of a source: items by kind, and where both can be asked for, clips that begin a video or go on."""
        members: dict[tuple[str, bool | None], list[int]] = {}
        checksum, held = 0, self.held.get(name, frozenset())
        for index in range(len(source)):
            shape = source.shape(index)
            checksum = zlib.crc32(f"{group_of(source, index)} {shape}".encode(), checksum)
            if index in held:
                continue
            for begins in (True, False) if shape.history > 0 and _cuts(source, shape) else (None,):
                if self.buckets.fit(shape, begins) is not None:
                    members.setdefault((shape.kind, begins), []).append(index)
        self.contents[name] = [len(source), checksum]
        if not members:
            raise ValueError(
                f"data: none of the {len(source) - len(held)} samples of source {name!r} is long enough for "
                f"batch.frames {self.buckets.frames} and small enough for batch.tokens {self.stage.batch.tokens}"
            )
        found = [ItemStream(name, kind, np.asarray(items), begins) for (kind, begins), items in members.items()]
        unused = len(source) - len(held) - len({index for items in members.values() for index in items})
        if unused:
            logger.warning("data: %d of %d samples of %s are too short or too large; unused", unused, len(source), name)
        return sorted(found, key=lambda stream: stream.name)

    def fit(self, name: str, index: int) -> tuple[Fit, tuple[bool, int]] | None:
        """The clip of an item, whether it has a reference, and its latent frames of history; None if it is unusable."""
        stream = self._by_name[name]
        source = self.sources[stream.source]
        if index >= len(source) or index in self.held.get(stream.source, ()):
            return None
        shape = source.shape(index)
        fit = self.buckets.fit(shape, stream.begins)
        return None if fit is None else (fit, (shape.reference, 0 if stream.begins else shape.history))

    def shares(self, step: int) -> dict[str, float]:
        """Shares of the streams at a step of the stage."""
        progress = min(1.0, step / self.stage.steps) if self.stage.steps > 0 else 0.0
        mix = {name: at(share, progress) for name, share in self.stage.mix.items()}
        first = at(self.stage.conditions.first_clip, progress)
        return stream_shares(self.streams, mix, self.stage.batch.kind_shares, first)


def _groups(planner: Planner, ahead: deque[StepPlan], data_rank: int, data_size: int) -> Iterator[Group]:
    """What a rank reads, in order; run by DataLoader as far ahead as it reads.

    It knows nothing of the loader, so that a loader nobody uses any more is gone at once, with its workers.
    """
    while True:
        plan = planner.plan()
        ahead.append(plan)
        yield from plan.of_rank(data_rank, data_size)


def check_share(stage: StageConfig, data_size: int) -> None:
    """Whether every rank gets as many micro-batches of a step.

    Raises:
        ValueError: it cannot.
    """
    count = stage.batch.count
    if count % data_size:
        raise ValueError(
            f"stages.{stage.name}.batch.count must be a multiple of the {data_size} data ranks, got {count}"
        )


class Loader:
    """Micro-batches of one rank, step by step, without end.

    Args:
        sources: by name, as in `stage.mix`.
        stage: what to draw and how to batch it.
        seed: of the run.
        data_rank, data_size: which share of a step's micro-batches this process reads.
        workers: processes that read ahead; 0 reads in this one.
        prefetch: steps that each worker reads ahead.
        clip_latents: duration of clips if `stage.batch.frames` is empty.
        count_tokens: tokens of a clip with its conditions in the model's sequence, for `stage.batch.tokens`.
        attention_tokens: tokens of a sample at which its attention costs as much as all else.
        max_groups: most groups of tokens with a timestep of their own in a packed micro-batch.
        pin_memory: put tensors into pinned memory, for fast copies to a GPU.
        peers: processes that read the same share, because they compute it together (context parallelism). They agree
            in every step on what could be read, with one small collective.
        device: of that collective.
        held: items by source that are not to be drawn.

    Attributes:
        changed: after `load_state_dict`, which sources are not what they were then, in words.
        figures: of the last step, see StepPlan.figures(); and `broken`, samples that this process could not read yet.
        broken: by source.

    Raises:
        ValueError: a source of the mix is missing or has no usable sample, the micro-batches do not divide over the
            ranks, shares are to change over a stage whose number of steps is not known, or there is a limit of tokens
            and no way to count them.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        stage: StageConfig,
        seed: int,
        data_rank: int = 0,
        data_size: int = 1,
        *,
        workers: int = 0,
        prefetch: int = 2,
        clip_latents: int = 8,
        count_tokens: CountTokens | None = None,
        attention_tokens: float = ATTENTION_TOKENS,
        max_groups: int = sys.maxsize,
        pin_memory: bool = False,
        peers: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        held: Mapping[str, frozenset[int]] | None = None,
    ) -> None:
        batch = stage.batch
        if count_tokens is None and batch.tokens > 0:
            raise ValueError(f"stages.{stage.name}.batch.tokens is {batch.tokens}, but nothing was given to count with")
        missing = [name for name in stage.mix if name not in sources]
        if missing:
            raise ValueError(f"stages.{stage.name}.mix: no source {missing[0]!r}; there are {', '.join(sources)}")
        check_share(stage, data_size)
        ramps = [value for value in (*stage.mix.values(), stage.conditions.first_clip) if isinstance(value, tuple)]
        if ramps and stage.steps <= 0:
            raise ValueError(
                f"stages.{stage.name}: mix and conditions.first_clip change with the steps of the stage, so it needs "
                f"`steps` and not only `minutes`; got {ramps[0]}"
            )
        self.stage, self.seed, self.data_rank, self.data_size = stage, seed, data_rank, data_size
        self.workers, self.prefetch, self.pin_memory = workers, prefetch, pin_memory
        self.peers, self.device = peers, device
        sizes = [(rows // 8, columns // 8) for rows, columns in batch.resolutions]
        frames = batch.frames or [clip_latents]
        used = {name: sources[name] for name in stage.mix}
        self._catalogue = _Catalogue(
            used, stage, Buckets(batch.tokens, frames, sizes, batch.fit, count=count_tokens or patches), held or {}
        )
        self._planner = Planner(
            Sampler(self._catalogue.streams, seed),
            self._catalogue.fit,
            self._catalogue.shares,
            count=batch.count,
            mode=batch.mode,
            size=batch.size,
            budget=batch.tokens,
            single=batch.kinds == "single",
            attention_tokens=attention_tokens,
            max_groups=max_groups,
            prefixes=stage.conditions.prefix not in (0, (0, 0)),
        )
        self._reader = Reader(used, seed, batch.mode == "pack")
        self._state = self._planner.state_dict()
        self._ahead: deque[StepPlan] = deque()  # planned, not yet returned
        self._reading: Iterator[Parcel] | None = None
        self._spare: Sample | None = None
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self.broken: dict[str, Broken] = {name: Broken() for name in used}
        self.figures: dict[str, float] = {}
        self.changed: list[str] = []

    def _start(self) -> Iterator[Parcel]:
        slots = self.stage.batch.count // self.data_size
        more: dict[str, Any] = {"prefetch_factor": max(1, self.prefetch * slots)} if self.workers else {}
        loader = DataLoader(
            self._reader,
            sampler=_groups(self._planner, self._ahead, self.data_rank, self.data_size),
            batch_size=None,
            collate_fn=_same,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(self.seed),  # else it takes a number from everybody's
            **more,
        )
        with sigterm_held():
            return iter(loader)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._reading is None:
            self._reading = self._start()
        read = [next(self._reading) for _ in range(self.stage.batch.count // self.data_size)]
        plan = self._ahead.popleft()
        groups = plan.of_rank(self.data_rank, self.data_size)
        batches = self._agreed([parcel.opened() for parcel in read], groups)
        for batch, group, parcel in zip(batches, groups, read, strict=True):
            self._note(batch, len(group), parcel.failures)
        batches = [self._filled(batch, group) for batch, group in zip(batches, groups, strict=True)]
        self._state = plan.state
        self.figures = plan.figures(self.data_size) | {"broken": sum(b.count for b in self.broken.values())}
        return batches

    def _agreed(self, batches: list[MicroBatch], groups: list[Group]) -> list[MicroBatch]:
        """The micro-batches without what a peer could not read: they must hold the same samples, or they hang."""
        if self.peers is None:
            return batches
        numbers = [planned.draw.number for group in groups for planned in group]
        mine = {number for batch in batches for number in batch.numbers}
        missing = torch.tensor([number not in mine for number in numbers], dtype=torch.int32, device=self.device)
        dist.all_reduce(missing, dist.ReduceOp.MAX, group=self.peers)
        gone = {number for number, lost in zip(numbers, missing.tolist(), strict=True) if lost}
        return [batch.without(gone) for batch in batches]

    def _note(self, batch: MicroBatch, planned: int, failures: list[tuple[str, str]]) -> None:
        if batch.samples:
            self._spare = batch.samples[0]
        for source, reason in failures:
            broken = self.broken[source]
            broken.count += 1
            if broken.count <= REASONS:
                broken.reasons.append(reason)
                logger.warning("data: broken sample left out: %s", reason)
            elif broken.count % 1000 == 0:
                logger.warning("data: %d broken samples of %s left out so far", broken.count, source)
        good = len(batch.samples)
        self._recent.extend([False] * good + [True] * (planned - good))
        share = sum(self._recent) / max(1, len(self._recent))
        if len(self._recent) >= ENOUGH and share > MOST:
            raise UserError(f"data: {share:.0%} of the last {len(self._recent)} samples are broken; {self._first()}")

    def _first(self) -> str:
        return "first: " + next((b.reasons[0] for b in self.broken.values() if b.reasons), "none")

    def _filled(self, batch: MicroBatch, group: Group) -> MicroBatch:
        """A micro-batch is never empty: every rank has to take part in the collectives of every one."""
        if batch.samples:
            return batch
        spare = self._spare if self._spare is not None else self._any(group[0])
        self._spare = spare
        return MicroBatch([spare], [group[0].draw.number], batch.packed, [0.0])

    def _any(self, planned: Planned) -> Sample:
        """A sample that can be read, of the same source, where nothing was read yet."""
        items = self._planner.sampler.streams[planned.draw.stream].items
        begin = int(np.searchsorted(items, planned.draw.index))
        for index in np.roll(items, -begin - 1)[:TRIES].tolist():
            found = self._catalogue.fit(planned.draw.stream, index)
            if found is None:
                continue
            fit, _ = found
            try:
                return self._reader.read(replace(planned, draw=replace(planned.draw, index=index), clip=fit.clip))
            except BrokenSample:
                continue
        tried = min(TRIES, len(items))
        raise UserError(f"data: none of {tried} samples of {planned.source!r} can be read; {self._first()}")

    def state_dict(self) -> dict[str, Any]:
        """What follows the last step returned; equal on every rank, whatever was read ahead."""
        return {"stage": self.stage.name, "contents": self._catalogue.contents, **self._state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, on any number of ranks and workers.

        From the state of another stage: samples are numbered on, and sources that both stages draw from go on in the
        middle of their epoch.
        """
        self.close()
        self.changed = self._differences(state.get("contents", {}))
        self._planner.load_state_dict(state, same_stage=state["stage"] == self.stage.name)
        self._state = self._planner.state_dict()

    def _differences(self, contents: Mapping[str, Sequence[int]]) -> list[str]:
        """Sources that hold something else than they did."""
        found = []
        for name, (count, checksum) in self._catalogue.contents.items():
            before = contents.get(name)
            if before is not None and list(before) != [count, checksum]:
                now = f"{count} samples" if count != before[0] else f"{count} samples, other ones"
                found.append(f"source {name} had {before[0]} samples and has {now}")
        return found

    def epochs(self) -> dict[str, float]:
        """How often every stream was gone through, including what was read ahead."""
        return self._planner.sampler.epochs()

    def close(self) -> None:
        """End the workers; what was read ahead is forgotten."""
        self._reading = None
        self._ahead.clear()
        self._planner.load_state_dict(self._state)
