# SPDX-License-Identifier: Apache-2.0
"""A profile of a few steps: Kineto's trace of what ran when, and where CUDA memory went."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from training.sections import LogConfig


class Profile:
    """Profiles the steps that a configuration asks for, on every rank; does nothing where it asks for none.

    Writes profile/rank0.json (open it in ui.perfetto.dev or chrome://tracing) and, with `memory_snapshot` on CUDA,
    profile/rank0-memory.pickle (pytorch.org/memory_viz).

    Args:
        config: `profile_at`, the first step of the run to profile, and `profile_steps`.
        folder: of the run.
        step: finished steps.
    """

    def __init__(self, config: LogConfig, folder: Path, step: int) -> None:
        self._config, self._folder, self._step = config, folder / "profile", step
        self._running: Any = None

    def __enter__(self) -> Profile:
        self._switch()
        return self

    def step(self) -> None:
        """To be called after every step of the run."""
        self._step += 1
        self._switch()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._finish()

    def _switch(self) -> None:
        begin, steps = self._config.profile_at, self._config.profile_steps
        if self._running is None and steps > 0 and self._step == begin:
            if self._config.memory_snapshot and torch.cuda.is_available():
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            self._running = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._running.start()
        elif self._running is not None and self._step == begin + steps:
            self._finish()

    def _finish(self) -> None:
        self._running.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{dist.get_rank() if dist.is_initialized() else 0}"
        self._running.export_chrome_trace(str(self._folder / f"{name}.json"))
        if self._config.memory_snapshot and torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._running = None
