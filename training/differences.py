# SPDX-License-Identifier: Apache-2.0
"""In what a run that goes on differs from what it was: said once, because nothing else would tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from training.config import Config

MOST = 8  # that are listed
# What may change without changing what is trained: where, how long, on which layout, what is logged and kept.
_FREE = ("run", "parallel", "checkpoint", "sample", "held_out", "log", "stage_tables")
_FREE_KEYS = ("data.workers", "data.prefetch", "model.start", "name", "steps", "minutes")
_IN_STAGES = ("batch", "optim", "conditions", "objective")  # sections whose values are those of the stages


def differences(before: Config, now: Config) -> list[str]:
    """Settings that change what is trained on or how, as `key old -> new`; stages are compared by name.

    Args:
        before: of the checkpoint.
        now: of the run that goes on from it.
    """
    old, new = dict(_said(before)), dict(_said(now))
    return [f"{key} {_word(old[key])} -> {_word(new[key])}" for key in old if key in new and old[key] != new[key]]


def in_words(found: list[str]) -> str:
    """A list of differences as one line."""
    more = f"; and {len(found) - MOST} more" if len(found) > MOST else ""
    return "; ".join(found[:MOST]) + more


def _said(config: Config) -> Iterator[tuple[str, Any]]:
    yield "run.seed", config.run.seed
    for section, values in asdict(config).items():
        if section not in (*_FREE, *_IN_STAGES):
            yield from _leaves(values, section)
    for stage in config.stages:
        yield from _leaves(asdict(stage), f"stages.{stage.name}")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if key in _FREE_KEYS or (key.count(".") == 2 and key.rsplit(".", 1)[1] in _FREE_KEYS):
        return
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    else:
        yield key, list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
