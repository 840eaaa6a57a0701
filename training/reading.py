# SPDX-License-Identifier: Apache-2.0
"""What worker processes do: planned samples become tensors, and go to the main process as one."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from talkingdit.data.sample import BrokenSample, Sample, Source, flaw
from training.batching import Group, MicroBatch, Planned


class TensorPlace(NamedTuple):
    """Where a tensor is in a parcel."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Parcel:
    """What a worker hands over: all tensors of a micro-batch as one.

    Every tensor that goes from one process to another takes a file descriptor, and pinned memory is slow to get; a few
    micro-batches of small tensors would run out of the usual thousand of the one.
    """

    batch: MicroBatch  # with places instead of tensors
    content: Tensor  # uint8
    failures: list[tuple[str, str]]  # source, reason

    @staticmethod
    def closed(batch: MicroBatch, failures: list[tuple[str, str]]) -> Parcel:
        tensors: list[tuple[TensorPlace, Tensor]] = []
        end = 0

        def put(tensor: Tensor) -> TensorPlace:
            nonlocal end
            tensors.append((TensorPlace(tensor.dtype, tuple(tensor.shape), end), tensor))
            end = -(-tensors[-1][0].end // 16) * 16  # aligned for every dtype
            return tensors[-1][0]

        samples = [_changed(sample, Tensor, put) for sample in batch.samples]
        content = torch.empty(end, dtype=torch.uint8)
        for place, tensor in tensors:
            content[place.begin : place.end].view(place.dtype).view(place.shape).copy_(tensor)
        return Parcel(replace(batch, samples=samples), content, failures)

    def pin_memory(self) -> Parcel:
        """Called by DataLoader."""
        return replace(self, content=self.content.pin_memory())

    def opened(self) -> MicroBatch:
        def get(place: TensorPlace) -> Tensor:
            return self.content[place.begin : place.end].view(place.dtype).view(place.shape)

        return replace(self.batch, samples=[_changed(sample, TensorPlace, get) for sample in self.batch.samples])


def _changed(sample: Sample, kind: type, change: Callable[[Any], Any]) -> Sample:
    """A sample with everything of a type changed, in its dictionaries too."""

    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one(inner) for key, inner in value.items()}
        return change(value) if isinstance(value, kind) else value

    return replace(sample, **{f.name: one(getattr(sample, f.name)) for f in fields(sample)})


class Reader(Dataset[Parcel]):
    """Turns planned samples into a micro-batch. It runs in the worker processes."""

    def __init__(self, sources: Mapping[str, Source], seed: int, packed: bool) -> None:
        self.sources, self.seed, self.packed = dict(sources), seed, packed

    def read(self, planned: Planned) -> Sample:
        """The sample; whatever is random about it follows from (seed, number).

        Raises:
            BrokenSample: it cannot be read, or is not what was planned.
        """
        key = f"{planned.source}[{planned.draw.index}]"
        rng = np.random.default_rng((self.seed, planned.draw.number))
        try:
            sample = self.sources[planned.source].sample(planned.draw.index, rng, planned.clip)
        except BrokenSample:
            raise
        except Exception as error:  # whatever a decoder raises for a damaged file: one sample must not end a run
            raise BrokenSample(key, f"{type(error).__name__}: {error}") from error
        clip = planned.clip
        if tuple(sample.latents.shape[1:]) != (clip.frames, clip.height, clip.width):
            expected = f"{clip.frames} x {clip.height} x {clip.width}"
            raise BrokenSample(f"{key} ({sample.key})", f"latents must be {expected}, got {list(sample.latents.shape)}")
        wrong = flaw(sample)
        if wrong is not None:
            raise BrokenSample(f"{key} ({sample.key})", wrong)
        return sample

    def __getitem__(self, group: Group) -> Parcel:
        samples, numbers, failures = [], [], []
        for planned in group:
            try:
                samples.append(self.read(planned))
                numbers.append(planned.draw.number)
            except BrokenSample as error:
                failures.append((planned.source, str(error)))
        return Parcel.closed(MicroBatch(samples, numbers, self.packed), failures)


@contextmanager
def sigterm_held() -> Iterator[None]:
    """SIGTERM waits. Threads and processes that are started meanwhile never take it but by sigwait.

    A worker that blocked it by itself would be late for threads that a library starts right after the fork, and a
    signal to a process goes to any thread that does not block it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_: int) -> None:
    """A signal to the whole job is the main process's to handle; workers read on until that one ends them.

    Sent by anybody, SIGTERM would end a worker, and DataLoader then the run before its last step is saved. Workers are
    to be started under `sigterm_held`.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
