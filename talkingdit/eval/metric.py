# SPDX-License-Identifier: Apache-2.0
"""What a metric is, and the table of all of them.

A metric measures one region of one video (`measure`), or collects features of each video and compares the two sets of
them (`collect`, `compare`). Its full name holds the backbone that measured it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from talkingdit.eval.evidence import Evidence
from talkingdit.eval.slots import SLOTS, Backbone, missing_line

FloatArray = npt.NDArray[np.float64]
Better = Literal["higher", "lower", "neither"]

PICTURES = ("whole", "face", "hands", "left_hand", "right_hand", "body")
FILES = ("pixels", "motion", "features", "faces", "hands", "speech")  # in which metrics are


@dataclass(frozen=True)
class Value:
    """What a metric says of one video.

    Attributes:
        value: the number; the mean over people and frames.
        curve: by frames, None where it was not measured; empty for metrics that have no value by frames.
        note: what a reader should know.
    """

    value: float
    curve: tuple[float | None, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: on the command line.
        title: in tables.
        about: what it measures, in the help and the report.
        better: which values are.
        regions: that it can measure; "sound" for what is heard.
        slot: of the backbone it needs, "" for none.
        method: stands in the full name, before the backbone, "opencv-dis".
        truth, text: does it need a true video, a text?
        version: changes whenever its values may.
        measure: of one video; raises NotMeasured.
        collect: features of one video and of its truth, each [n, d], for metrics of sets.
        least: samples of a set below which a warning is given.
        perfect: the value of the truth itself, where there is one.
        first: looks at the first frames alone: of a video that is judged in parts, at the first part.
    """

    name: str
    title: str
    about: str
    better: Better
    regions: tuple[str, ...]
    measure: Callable[[Evidence, str], Value] | None = None
    slot: str = ""
    method: str = ""
    truth: bool = False
    text: bool = False
    version: int = 1
    collect: Callable[[Evidence, str], tuple[FloatArray, FloatArray]] | None = None
    least: int = 0
    perfect: float | None = None
    first: bool = False

    def full_name(self, backbones: Mapping[str, Backbone]) -> str:
        """The name with what measured it: "csim[dlib-resnet]"."""
        by = [one for one in (self.method, backbones[self.slot].id if self.slot in backbones else "") if one]
        return f"{self.name}[{','.join(by)}]" if by else self.name

    def key(self, backbones: Mapping[str, Backbone]) -> str:
        """What decides about its values: names and versions."""
        version = backbones[self.slot].version if self.slot in backbones else ""
        return f"{self.full_name(backbones)}/{self.version}/{version}"

    def missing(self, backbones: Mapping[str, Backbone]) -> str:
        """Why it cannot be measured here, "" if it can."""
        return missing_line(SLOTS[self.slot]) if self.slot and self.slot not in backbones else ""


def all_metrics() -> dict[str, Metric]:
    """Every metric by name, in the order of reports."""
    found: dict[str, Metric] = {}
    for file in FILES:
        for metric in importlib.import_module(f"talkingdit.eval.metrics.{file}").METRICS:
            found[metric.name] = metric
    return found


def over_people(values: list[tuple[float, FloatArray]]) -> Value:
    """The mean over people of a value and of its curve [F] with NaN where it was not measured."""
    curves = np.stack([curve for _, curve in values])
    known = ~np.isnan(curves)
    mean = np.where(known, curves, 0).sum(0) / np.maximum(known.sum(0), 1)
    curve = tuple(
        float(v) if seen else None for v, seen in zip(mean.tolist(), np.any(known, axis=0).tolist(), strict=True)
    )
    return Value(float(np.mean([value for value, _ in values])), curve)
