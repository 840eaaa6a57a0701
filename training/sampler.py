# SPDX-License-Identifier: Apache-2.0
"""The order of samples: one endless sequence for a run, the same whoever reads it and on however many processes.

Sources are mixed by shares. Every draw credits each stream with its share and debits the one that is drawn; the stream
that is owed most is next. So after any number of draws no stream is further from its share than the number of streams,
without a random number, and shares may change between draws. Within a stream every item comes once per epoch, in an
order that follows from (seed, name, epoch).
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """One place in the order.

    Args:
        number: of the sample in the run, from 0; whatever is random about the sample follows from (seed, number).
        stream: name of the stream it was drawn from.
        index: item of the stream's source.
    """

    number: int
    stream: str
    index: int


@dataclass(frozen=True)
class ItemStream:
    """Items of one source and one kind, drawn without repetition.

    Args:
        items: [n] indices into the source.
        begins: whether clips that begin a video are asked for, or clips that go on; None: items are what they are.
    """

    source: str
    kind: str
    items: np.ndarray
    begins: bool | None = None

    @property
    def name(self) -> str:
        return "/".join([self.source, self.kind, *([] if self.begins is None else [("later", "first")[self.begins]])])


def stream_shares(
    streams: Iterable[ItemStream],
    mix: Mapping[str, float],
    kinds: Mapping[str, float] | None = None,
    first: float = 0.0,
) -> dict[str, float]:
    """Share of every stream, by name; they add up to one.

    Args:
        mix: source: weight, in any unit (audio 1 to image 1.5). Sources that are left out are not drawn.
        kinds: kind: weight in its source's share; of a source that has any of these kinds, others are not drawn. A
            source that has none, and every source without weights, is divided by the numbers of items: every item is
            as likely.
        first: share of clips that begin a video, where a source can give both.

    Raises:
        ValueError: a source that is not there, a weight below zero, or nothing left to draw.
    """
    by_source: dict[str, list[ItemStream]] = {}
    for stream in streams:
        by_source.setdefault(stream.source, []).append(stream)
    unknown = sorted(set(mix) - set(by_source))
    if unknown:
        raise ValueError(f"data.mix: no source {unknown[0]!r}; there are {', '.join(sorted(by_source))}")
    named = kinds or {}
    there = sorted({stream.kind for group in by_source.values() for stream in group})
    strange = sorted(set(named) - set(there))
    if strange:
        raise ValueError(f"batch.kind_shares: no sample is of kind {strange[0]!r}; there are {', '.join(there)}")
    for where, weights in (("data.mix", mix), ("batch.kind_shares", named)):
        low = [name for name, weight in weights.items() if weight < 0]
        if low:
            raise ValueError(f"{where}: the share of {low[0]!r} must not be negative, got {weights[low[0]]}")
    begins = {None: 1.0, True: first, False: 1.0 - first}
    shares: dict[str, float] = {}
    for source, group in by_source.items():
        # Streams of the same items, first and later, share what their number of items is worth.
        items = {stream.name: begins[stream.begins] * len(stream.items) for stream in group}
        by_kind: dict[str, float] = {}
        for stream in group:
            by_kind[stream.kind] = by_kind.get(stream.kind, 0.0) + items[stream.name]
        told = set(named) & set(by_kind)
        weight = {kind: float(named.get(kind, 0.0)) if told else worth for kind, worth in by_kind.items()}
        whole = sum(weight.values())
        for stream in group:
            inner = items[stream.name] / by_kind[stream.kind] if by_kind[stream.kind] > 0 else 0.0
            part = weight[stream.kind] / whole if whole > 0 else 0.0
            shares[stream.name] = mix.get(source, 0.0) * part * inner
    total = sum(shares.values())
    if not total > 0:
        raise ValueError(f"data.mix: nothing to draw, every share is zero: {dict(mix)}")
    return {name: share / total for name, share in shares.items()}


class Sampler:
    """Draws from streams by shares. Its state is a dict of counters, equal on every process.

    Args:
        streams: of distinct names.
        seed: of the run.
    """

    def __init__(self, streams: Sequence[ItemStream], seed: int) -> None:
        self.streams = {stream.name: stream for stream in streams}
        self.seed = seed
        self.number = 0
        self._epoch = dict.fromkeys(self.streams, 0)
        self._position = dict.fromkeys(self.streams, 0)
        self._owed = dict.fromkeys(self.streams, 0.0)
        self._left: dict[str, dict[str, Any]] = {}  # counters of streams that another stage draws from
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def kind(self, shares: Mapping[str, float]) -> str:
        """The kind that is owed most, in samples, for steps of a single kind."""
        owed: dict[str, float] = {}
        for name, share in shares.items():
            if share > 0:
                kind = self.streams[name].kind
                owed[kind] = owed.get(kind, 0.0) + self._owed[name] + share
        return max(owed, key=lambda kind: owed[kind])

    def draw(self, shares: Mapping[str, float], kind: str | None = None) -> Draw:
        """The next sample; `shares` of stream_shares(), `kind` restricts the choice."""
        for name, share in shares.items():
            self._owed[name] += share
        names = (n for n, share in shares.items() if share > 0 and kind in (None, self.streams[n].kind))
        name = max(names, key=lambda n: self._owed[n])
        self._owed[name] -= 1.0
        stream = self.streams[name]
        index = int(stream.items[self._order(name)[self._position[name]]])
        self._position[name] += 1
        if self._position[name] == len(stream.items):
            self._position[name], self._epoch[name] = 0, self._epoch[name] + 1
        self.number += 1
        return Draw(self.number - 1, name, index)

    def _order(self, name: str) -> np.ndarray:
        epoch = self._epoch[name]
        kept = self._orders.get(name)
        if kept is None or kept[0] != epoch:
            rng = np.random.default_rng((self.seed, zlib.crc32(name.encode()), epoch))
            kept = self._orders[name] = epoch, rng.permutation(len(self.streams[name].items))
        return kept[1]

    def epochs(self) -> dict[str, float]:
        """How often every stream was gone through."""
        return {n: self._epoch[n] + self._position[n] / len(s.items) for n, s in self.streams.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: how many samples were drawn, and how far every stream is."""
        counters = {
            name: {
                "epoch": self._epoch[name],
                "position": self._position[name],
                "size": len(stream.items),
                "owed": self._owed[name],
            }
            for name, stream in self.streams.items()
        }
        return {"number": self.number, "streams": {**self._left, **counters}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of this stage or of another one: what both draw from goes on in the middle of its epoch.

        A stream whose number of items has changed since begins its next epoch.
        """
        self.number = state["number"]
        self._left = {name: dict(c) for name, c in state["streams"].items() if name not in self.streams}
        for name, stream in self.streams.items():
            counters = state["streams"].get(name)
            if counters is None:
                self._epoch[name], self._position[name], self._owed[name] = 0, 0, 0.0
                continue
            self._epoch[name], self._position[name] = counters["epoch"], counters["position"]
            self._owed[name] = counters["owed"]
            if counters["size"] != len(stream.items):
                logger.warning(
                    "data: %s had %d samples and has %d now; it begins a new epoch",
                    name,
                    counters["size"],
                    len(stream.items),
                )
                self._position[name], self._epoch[name] = 0, self._epoch[name] + 1
