# SPDX-License-Identifier: Apache-2.0
"""Which samples make up a step: micro-batches of equal shapes, or packed ones of a token budget, and who gets which.

A step is planned from shapes alone, by everyone alike and for all ranks together; a rank then reads its part. So the
samples of a step follow from the seed and the place in the run, not from the number of ranks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from talkingdit.data.sample import ClipRequest, Sample
from training.buckets import Fit
from training.sampler import Draw, Sampler

# Tokens of a sample at which attention costs as much as all else in a block of Wan 14B: 3 dim + ffn_dim, from
# 12 n dim^2 + 4 n dim ffn_dim operations of the products and 4 n^2 dim of attention.
ATTENTION_TOKENS = 29184
LOOK_AHEAD = 1.5  # token budgets of a step that wait to be packed
FILL = 0.99  # of the budget; the rest is room in which to make costs equal, worth more than it holds
ROUNDS, PARTNERS = 64, 4  # exchanges between micro-batches, and with how many of the cheapest each is tried
PATIENCE = 16  # steps' worth of samples that wait for others of their shape, before they go without


@dataclass
class MicroBatch:
    """Samples that go through the model together.

    Args:
        samples: with `packed`, of any shapes; otherwise of equal ones.
        numbers: number of each sample in the run.
        packed: one sequence of all samples, or a batch axis.
        weights: of each sample's loss, 1; 0 for one that only stands in where nothing could be read, so that this rank
            takes part in the collectives.
    """

    samples: list[Sample]
    numbers: list[int]
    packed: bool
    weights: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = self.weights or [1.0] * len(self.samples)

    def without(self, numbers: Container[int]) -> MicroBatch:
        """Without the samples of these numbers."""
        keep = [i for i, number in enumerate(self.numbers) if number not in numbers]
        return MicroBatch(
            [self.samples[i] for i in keep],
            [self.numbers[i] for i in keep],
            self.packed,
            [self.weights[i] for i in keep],
        )


@dataclass(frozen=True)
class Planned:
    """A sample that will be read."""

    draw: Draw
    source: str
    kind: str
    clip: ClipRequest
    tokens: int
    conditions: tuple[bool, int]  # reference?, latent frames of history
    since: int  # step of the stage in which it was drawn
    groups: int = 2  # of tokens with a timestep of their own: noisy and clean ones, or one per latent frame and one

    @property
    def alike(self) -> tuple[Any, ...]:
        """Samples for which this is equal can be stacked."""
        return self.kind, self.clip, self.conditions


Group = list[Planned]


def cost(samples: Sequence[Planned], attention_tokens: float) -> float:
    """Work of a micro-batch in units of a token's products; every sample attends to itself only."""
    return sum(p.tokens + p.tokens**2 / attention_tokens for p in samples)


def pack(
    waiting: Sequence[Planned],
    count: int,
    budget: int,
    attention_tokens: float = ATTENTION_TOKENS,
    max_groups: int = sys.maxsize,
) -> tuple[list[Group], list[Planned]]:
    """Fill `count` micro-batches of at most `budget` tokens: (micro-batches, samples left over).

    None gets more groups of tokens with a timestep of their own than `max_groups`, which kernels can tell apart in one
    sequence; that matters for small frames only.

    First fit decreasing, to 99 % of the budget; samples that wait longer come first, so none waits for ever. What was
    chosen is then spread anew over the micro-batches, so that their costs are as equal as the budget allows.
    """
    order = sorted(waiting, key=lambda p: (p.since, -p.tokens, p.draw.number))
    groups: list[Group] = [[] for _ in range(count)]
    room = [int(FILL * budget)] * count
    left = []
    for planned in order:
        at = next((i for i in range(count) if _takes(groups[i], planned, room[i], max_groups)), None)
        if at is None:
            left.append(planned)
            continue
        groups[at].append(planned)
        room[at] -= planned.tokens
    groups = _spread(groups, budget, attention_tokens, max_groups)
    left.sort(key=lambda p: p.draw.number)
    return groups, left


def _takes(group: Group, planned: Planned, room: int, max_groups: int) -> bool:
    return not group or (room >= planned.tokens and _steps(group, planned, max_groups))


def _steps(group: Group, new: Planned, max_groups: int, instead: Planned | None = None) -> bool:
    """Whether a sample fits in, perhaps for another one, by the number of timesteps that the kernels tell apart."""
    taken = sum(p.groups for p in group) - (instead.groups if instead else 0)
    return taken + new.groups <= max_groups


def _spread(groups: list[Group], budget: int, attention_tokens: float, max_groups: int) -> list[Group]:
    """The same samples, each to the micro-batch that has least so far; as before if that breaks the budget."""
    chosen = sorted((p for group in groups for p in group), key=lambda p: (-p.tokens, p.draw.number))
    spread: list[Group] = [[] for _ in groups]
    tokens = [0] * len(groups)
    work = [0.0] * len(groups)
    for planned in chosen:
        fitting = [
            i
            for i in range(len(groups))
            if tokens[i] + planned.tokens <= budget and _steps(spread[i], planned, max_groups)
        ]
        if not fitting:
            spread = [list(group) for group in groups]
            break
        at = min(fitting, key=lambda i: work[i])
        spread[at].append(planned)
        tokens[at] += planned.tokens
        work[at] += cost([planned], attention_tokens)
    return _exchanged(spread, budget, attention_tokens, max_groups)


def _exchanged(groups: list[Group], budget: int, attention_tokens: float, max_groups: int) -> list[Group]:
    """Move or swap samples of the dearest micro-batch to and with the cheapest ones while that evens them out."""
    work = [cost(group, attention_tokens) for group in groups]
    tokens = [sum(p.tokens for p in group) for group in groups]
    for _ in range(ROUNDS):
        order = sorted(range(len(groups)), key=lambda i: (work[i], i))
        high = order[-1]
        best: tuple[float, int, Planned, Planned | None] | None = None
        for low in order[: min(PARTNERS, len(order) - 1)]:
            theirs = [(None, 0, 0.0), *((p, p.tokens, cost([p], attention_tokens)) for p in groups[low])]
            for mine in groups[high]:
                own = cost([mine], attention_tokens)
                for other, size, value in theirs:
                    less = own - value
                    alone = other is None and len(groups[high]) == 1
                    if alone or less <= 0 or tokens[low] + mine.tokens - size > budget:
                        continue
                    if not _steps(groups[low], mine, max_groups, other):
                        continue
                    if other and not _steps(groups[high], other, max_groups, mine):
                        continue
                    left = max(work[high] - less, work[low] + less)
                    if left < (best[0] if best else work[high] * (1 - 1e-4)):
                        best = left, low, mine, other
        if best is None:
            break
        _, low, mine, other = best
        groups[high].remove(mine)
        groups[low].append(mine)
        if other:
            groups[low].remove(other)
            groups[high].append(other)
        for i in (high, low):
            work[i], tokens[i] = cost(groups[i], attention_tokens), sum(p.tokens for p in groups[i])
    return groups


def slots(costs: Sequence[float], data_size: int) -> list[list[int]]:
    """Which micro-batches run at the same time, and on which rank: rank r takes entry r of every slot, in turn.

    Ranks wait for each other in every micro-batch, so those of similar cost share a slot; who gets the dearer ones
    alternates.

    Raises:
        ValueError: they do not divide evenly.
    """
    if len(costs) % data_size:
        raise ValueError(
            f"batch.count: {len(costs)} micro-batches do not divide over {data_size} data ranks; "
            f"take {math.ceil(len(costs) / data_size) * data_size}"
        )
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    rows = [order[at : at + data_size] for at in range(0, len(order), data_size)]
    return [row if j % 2 == 0 else row[::-1] for j, row in enumerate(rows)]


@dataclass(frozen=True)
class StepPlan:
    """All micro-batches of a step, over all ranks, and the state with which the plan of the next step begins."""

    groups: list[Group]
    state: dict[str, Any]
    capacity: int  # what the groups could hold: tokens if packed, samples if stacked
    packed: bool
    attention_tokens: float

    def of_rank(self, data_rank: int, data_size: int) -> list[Group]:
        """The micro-batches of one rank, in its order."""
        costs = [cost(group, self.attention_tokens) for group in self.groups]
        return [self.groups[slot[data_rank]] for slot in slots(costs, data_size)]

    def figures(self, data_size: int) -> dict[str, float]:
        """What logs tell of it.

        samples, tokens: of the step. unused: share of the token budget, or of the places in stacks, that is not filled
        (there is no padding). imbalance: how much more tokens the busiest rank has than the mean one, as a share.
        idle: share of all ranks' time, by cost, spent waiting for the dearest micro-batch of the moment.
        """
        costs = [cost(group, self.attention_tokens) for group in self.groups]
        sizes = [sum(p.tokens for p in group) for group in self.groups]
        rows = slots(costs, data_size)
        of_ranks = [sum(sizes[row[rank]] for row in rows) for rank in range(data_size)]
        samples, tokens = sum(map(len, self.groups)), sum(sizes)
        return {
            "samples": samples,
            "tokens": tokens,
            "unused": 1 - (tokens if self.packed else samples) / self.capacity,
            "imbalance": max(of_ranks) * data_size / tokens - 1,
            "idle": 1 - sum(costs) / (data_size * sum(max(costs[i] for i in row) for row in rows)),
        }


class Planner:
    """Plans one step after another.

    Args:
        sampler: the order of samples.
        fits: per stream, the clip of an item and whether it has a reference and how much history.
        shares: of streams, by step of the stage.
        count, mode, size, budget, single: as in BatchConfig (`tokens` and `kinds` = "single").
        attention_tokens: tokens of a sample at which its attention costs as much as all else.
        max_groups: most groups of tokens with a timestep of their own in a packed micro-batch.
        prefixes: some samples are given latents that are clean, so each latent frame has a timestep of its own.
    """

    def __init__(
        self,
        sampler: Sampler,
        fits: Callable[[str, int], tuple[Fit, tuple[bool, int]] | None],
        shares: Callable[[int], Mapping[str, float]],
        *,
        count: int,
        mode: Literal["stack", "pack"],
        size: int = 1,
        budget: int = 0,
        single: bool = False,
        attention_tokens: float = ATTENTION_TOKENS,
        max_groups: int = sys.maxsize,
        prefixes: bool = False,
    ) -> None:
        self.prefixes = prefixes
        self.sampler, self.fits, self.shares = sampler, fits, shares
        self.count, self.packed, self.size, self.budget, self.single = count, mode == "pack", size, budget, single
        self.attention_tokens, self.max_groups = attention_tokens, max_groups
        self.step = 0
        self.waiting: list[Planned] = []

    def plan(self) -> StepPlan:
        """The next step; every step counts, whether it is then trained or not."""
        shares = self.shares(self.step)
        kind = self.sampler.kind(shares) if self.single else None
        mine = [p for p in self.waiting if kind in (None, p.kind)]
        others = [p for p in self.waiting if kind not in (None, p.kind)]
        groups, left = (self._pack if self.packed else self._stack)(mine, shares, kind)
        self.waiting = sorted([*others, *left], key=lambda p: p.draw.number)
        self.step += 1
        capacity = self.count * (self.budget if self.packed else self.size)
        return StepPlan(groups, self.state_dict(), capacity, self.packed, self.attention_tokens)

    def _draw(self, shares: Mapping[str, float], kind: str | None) -> Planned:
        planned = self._planned(self.sampler.draw(shares, kind), self.step)
        assert planned is not None  # streams hold usable items only
        return planned

    def _planned(self, draw: Draw, since: int) -> Planned | None:
        stream = self.sampler.streams.get(draw.stream)
        found = self.fits(draw.stream, draw.index) if stream else None
        if stream is None or found is None:
            return None
        fit, conditions = found
        groups = 1 + (fit.clip.frames or 1) if self.prefixes else 2
        return Planned(draw, stream.source, stream.kind, fit.clip, fit.tokens, conditions, since, groups)

    def _pack(
        self, mine: list[Planned], shares: Mapping[str, float], kind: str | None
    ) -> tuple[list[Group], list[Planned]]:
        tokens = sum(p.tokens for p in mine)
        while tokens < LOOK_AHEAD * self.count * self.budget or len(mine) < self.count:
            mine.append(self._draw(shares, kind))
            tokens += mine[-1].tokens
        return pack(mine, self.count, self.budget, self.attention_tokens, self.max_groups)

    def _stack(
        self, mine: list[Planned], shares: Mapping[str, float], kind: str | None
    ) -> tuple[list[Group], list[Planned]]:
        # Groups are complete in the order of their last sample. If very many samples wait for others of their shape,
        # the oldest of them goes with those that it has.
        patience = PATIENCE * self.count * self.size
        partial: dict[tuple[Any, ...], Group] = {}
        held = 0
        done: list[Group] = []
        queue = iter(mine)
        while len(done) < self.count:
            if held > patience:
                done.append(partial.pop(next(iter(partial))))
                held -= len(done[-1])
                continue
            planned = next(queue, None) or self._draw(shares, kind)
            group = partial.setdefault(planned.alike, [])
            group.append(planned)
            held += 1
            if len(group) == self.size:
                done.append(partial.pop(planned.alike))
                held -= self.size
        return done, [p for group in partial.values() for p in group] + list(queue)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and names."""
        waiting = [[p.draw.number, p.draw.stream, p.draw.index, p.since] for p in self.waiting]
        return {"step": self.step, "sampler": self.sampler.state_dict(), "waiting": waiting}

    def load_state_dict(self, state: Mapping[str, Any], same_stage: bool = True) -> None:
        """Go on from a state; that of another stage begins at step 0, without what waits there and is not used here."""
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"] if same_stage else 0
        entries = (
            self._planned(Draw(number, stream, index), since if same_stage else -1)
            for number, stream, index, since in state["waiting"]
        )
        self.waiting = [p for p in entries if p is not None]
