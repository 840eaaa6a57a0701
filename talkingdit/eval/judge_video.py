# SPDX-License-Identifier: Apache-2.0
"""Judge one video: every metric in every region, what could not be measured and why, and pictures for the report."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from talkingdit.errors import UserError
from talkingdit.eval.clip import EvalClip, Frames, in_step, is_even, read_first
from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.finders import FINDERS
from talkingdit.eval.found import Found
from talkingdit.eval.job import Pair
from talkingdit.eval.jwb_compat import FRAMES
from talkingdit.eval.metric import Metric
from talkingdit.eval.parts import join_facts, join_values, read_parts, read_sound
from talkingdit.eval.protocol import Name, metrics_of
from talkingdit.eval.slots import Backbone, resolve_all
from talkingdit.media.checks import digest_of
from talkingdit.media.container import MediaFile
from talkingdit.media.timeline import length, timeline

SOUND = "sound"  # the region of what is heard
SAME_SHAPE, SHORTER = 0.02, 0.1  # parts of proportions and length by which a video may differ from its truth untold
LONGEST_REASON = 200  # letters of what a library says
SHEET_FRAMES, SHEET_HEIGHT, SHEET_WIDTH = 8, 120, 480  # of the contact sheet; the largest that a frame has there
COLOURS = {"face": (64, 160, 255), "hands": (255, 160, 32), "left_hand": (255, 96, 96), "right_hand": (255, 200, 0)}


@dataclass(frozen=True)
class JudgePlan:
    """How videos are judged; it crosses to worker processes.

    Attributes:
        metrics: names of metrics.
        regions: names of regions.
        backbones: files and folders that the user gives, by slot.
        finder: name of a finder.
        protocol: "jwb" or "jwb-compat".
    """

    metrics: tuple[str, ...]
    regions: tuple[str, ...]
    backbones: Mapping[str, Path] = field(default_factory=dict)
    finder: str = "real"
    protocol: Name = "jwb"


@dataclass(frozen=True)
class Tools:
    """A plan made real in a process."""

    metrics: tuple[Metric, ...]
    regions: tuple[str, ...]
    backbones: Mapping[str, Backbone]
    finder: Any

    @staticmethod
    def of(plan: JudgePlan) -> Tools:
        """Raises UserError: names that do not exist, backbones that are not there."""
        known = metrics_of(plan.protocol)
        for name in plan.metrics:
            if name not in known:
                raise UserError(f"eval: no metric is called {name!r}; expected some of {', '.join(known)}.")
        if plan.finder not in FINDERS:
            raise UserError(f"eval: no finder is called {plan.finder!r}; expected one of {', '.join(FINDERS)}.")
        metrics = tuple(known[name] for name in plan.metrics)
        finder = FINDERS[plan.finder]()
        own = {slot: backbone for slot, backbone in finder.backbones.items() if slot not in plan.backbones}
        return Tools(metrics, plan.regions, resolve_all(plan.backbones) | own, finder)

    def not_available(self) -> dict[str, str]:
        """Metrics and regions that cannot be measured here, with the line that says what to give."""
        lacking = {metric.title: line for metric in self.metrics if (line := metric.missing(self.backbones))}
        regions = {f"region {name}": line for name, line in self.finder.missing().items() if name in self.regions}
        return lacking | regions

    def possible(self) -> list[tuple[Metric, str]]:
        """Metrics with each of their regions that can be measured here."""
        absent = self.finder.missing()
        return [
            (metric, region)
            for metric in self.metrics
            if not metric.missing(self.backbones)
            for region in metric.regions
            if (region == SOUND or region in self.regions) and region not in absent
        ]


@dataclass
class Judged:
    """What is known of one video; JSON but for the features.

    Attributes:
        values: {"ssim|face": {"value", "curve", "note"}} by full name and region; {"missing": why} where there is none.
        features: {"fid[...]|whole": (of the video, of the truth)} for metrics of sets.
        facts: frames, fps, seconds, size, people, share of frames by region.
        sheet: contact sheet as JPEG in base64.
        failed: {"ssim|face": sentence} of what went wrong while it was measured; another run may do better.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    sheet: str = ""
    failed: dict[str, str] = field(default_factory=dict)


def judge(pair: Pair, tools: Tools, skip: Sequence[str] = ()) -> Judged:
    """Measure what is possible of one video.

    Args:
        pair: video and truth.
        tools: metrics and networks.
        skip: keys of values that are known already.

    Raises:
        UserError: a file cannot be read.
    """
    wanted = [(metric, region) for metric, region in tools.possible() if key_of(metric, region, tools) not in skip]
    judged: list[Judged] = []
    key = "" if pair.truth is None else digest_of(pair.truth)
    for part in read_parts(pair.gen, pair.truth):
        if part.number and pair.truth is not None and part.truth is None:
            judged.append(Judged(facts=_facts(part.clip) | {"compared": 0}))  # behind the end of the truth
            continue
        evidence = _evidence(pair, tools, part.clip, part.truth, f"{key}/{part.number}" if key else "")
        here = [one for one in wanted if part.whole or not (one[1] == SOUND or (part.number and one[0].first))]
        published = [] if pair.truth is None or part.number or _same_frames(pair) else [w for w in here if w[0].first]
        judged.append(_judge([one for one in here if one not in published], evidence, tools))
        if published:
            _add(judged[-1], _judge(published, _frame_by_frame(pair, tools, part.clip), tools))
        if not part.number:
            judged[0].sheet = contact_sheet(evidence)
            size = part.clip.frames.shape[1:3] if part.truth is None else part.truth.frames.shape[1:3]
        del part, evidence  # before the next ones are read
    if pair.truth is not None and pair.truth != pair.gen:
        judged[0].facts |= _unequal(judged, pair.truth, size)
    if len(judged) == 1:
        return judged[0]
    heard = [one for one in wanted if one[1] == SOUND]
    if heard:
        first = next(read_parts(pair.gen, None)).clip
        clip = replace(first, frames=first.frames[:1], sound=read_sound(pair.gen))
        judged.append(_judge(heard, _evidence(pair, tools, clip, None, ""), tools))
    return _joined(judged, parts=len(judged) - bool(heard))


def _unequal(judged: Sequence[Judged], truth: Path, size: tuple[int, ...]) -> dict[str, Any]:
    """In what a video differs from its truth that values do not say: "shorter" and "stretched", with how much.

    Args:
        size: height and width of the truth.
    """
    out: dict[str, Any] = {}
    height, width = size
    facts = judged[0].facts
    if abs(facts["width"] * height / (facts["height"] * width) - 1) > SAME_SHAPE:
        out["stretched"] = f"{facts['width']}x{facts['height']} to {width}x{height}"
    its = float(length(truth).pictures - (timeline(truth).pictures or 0))
    if sum(one.facts["seconds"] for one in judged) < (1 - SHORTER) * its:
        out["shorter"] = f"the true video lasts {its:.2f} s"
    return out


def _same_frames(pair: Pair) -> bool:
    """Are frames at equal times those of equal numbers?"""
    assert pair.truth is not None
    if pair.gen == pair.truth:
        return is_even(pair.gen)
    rates, count = [], FRAMES
    for path in (pair.gen, pair.truth):
        with MediaFile(path) as source:
            stream = source.need_pictures()
            rates.append(stream.average_rate or stream.base_rate or 0)
        count = max(count, length(path).count)
    return is_even(pair.gen) and is_even(pair.truth) and in_step(rates[0], rates[1], count)


def _frame_by_frame(pair: Pair, tools: Tools, clip: EvalClip) -> Evidence:
    """The first frames of both files by their numbers, as the published program reads them."""
    assert pair.truth is not None
    count = len(clip.frames)
    gen, truth = (read_first(path, count, path.name) for path in (pair.gen, pair.truth))
    return _evidence(pair, tools, gen, truth, "")


def _add(judged: Judged, more: Judged) -> None:
    """Values that were measured on other frames of the same video."""
    judged.values.update(more.values)
    judged.features.update(more.features)
    judged.failed.update(more.failed)


def _joined(judged: Sequence[Judged], parts: int) -> Judged:
    """What the parts of a video make together; what stands behind them is of all that is heard."""
    values = join_values([(one.facts.get("compared", one.facts["frames"]), one.values) for one in judged])
    keys = dict.fromkeys(key for one in judged for key in one.features)
    pairs = {key: [one.features[key] for one in judged if key in one.features] for key in keys}
    features = {
        key: (np.concatenate([a for a, _ in of]), np.concatenate([b for _, b in of])) for key, of in pairs.items()
    }
    failed = {key: told for one in judged for key, told in one.failed.items()}
    for key in failed:  # what some parts say is not of the whole video
        values.pop(key, None)
        features.pop(key, None)
    return Judged(values, features, join_facts([one.facts for one in judged[:parts]]), judged[0].sheet, failed)


def _evidence(pair: Pair, tools: Tools, clip: EvalClip, truth: EvalClip | None, truth_key: str) -> Evidence:
    regions = frozenset(region for _, region in tools.possible())
    return Evidence(clip, truth, tools.finder, regions, tools.backbones, pair.text.words, truth_key)


def _judge(wanted: Sequence[tuple[Metric, str]], evidence: Evidence, tools: Tools) -> Judged:
    out = Judged()
    for metric, region in wanted:
        key = key_of(metric, region, tools)
        try:
            if metric.truth and evidence.truth is None:
                raise NotMeasured("needs a true video")
            if metric.measure is not None:
                value = metric.measure(evidence, region)
                if math.isnan(value.value):
                    raise NotMeasured("what came out is not a number")
                out.values[key] = {"value": value.value, "curve": _rounded(value.curve), "note": value.note}
            elif metric.collect is not None:
                both = metric.collect(evidence, region)
                if not all(np.isfinite(features).all() for features in both):
                    raise NotMeasured("its features are not finite")
                out.features[key] = both
        except NotMeasured as why:
            out.values[key] = {"missing": str(why)}
        except MemoryError:
            raise
        except Exception as error:  # whatever a library raises: one metric must not end the work on all others
            out.failed[key] = _sentence(error)
    out.facts = _facts(evidence.gen)
    if evidence.truth is not None:
        out.facts["compared"] = evidence.frames
        if len(evidence.truth.frames) < len(evidence.gen.frames):
            short = len(evidence.gen.frames) - len(evidence.truth.frames)
            out.facts["note"] = f"the true video ends {short} frames earlier"
    if "found" in evidence.__dict__:
        out.facts["people"] = evidence.found.people
    return out


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"[:LONGEST_REASON]


def key_of(metric: Metric, region: str, tools: Tools) -> str:
    """The key of a value: full name and region."""
    return f"{metric.full_name(tools.backbones)}|{region}"


def _facts(clip: EvalClip) -> dict[str, Any]:
    return {
        "frames": len(clip.frames),
        "fps": round(clip.fps, 4),
        "seconds": round(clip.seconds, 3),
        "width": clip.frames.shape[2],
        "height": clip.frames.shape[1],
        "sound": clip.sound is not None,
    }


def _rounded(curve: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.5g}") for value in curve]


def contact_sheet(evidence: Evidence) -> str:
    """Eight frames with the boxes of what was found, above those of the truth: a JPEG in base64."""
    n = evidence.frames
    chosen = np.unique(np.round(np.linspace(0, n - 1, min(n, SHEET_FRAMES))).astype(int))
    rows = [_row(evidence.gen.frames, evidence.__dict__.get("found"), chosen)]
    if evidence.truth is not None:
        rows.append(_row(evidence.truth.frames, evidence.__dict__.get("found_in_truth"), chosen))
    width = max(row.shape[1] for row in rows)
    padded = [cv2.copyMakeBorder(row, 0, 4, 0, width - row.shape[1], cv2.BORDER_CONSTANT) for row in rows]
    ok, data = cv2.imencode(".jpg", np.concatenate(padded)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    return base64.b64encode(data.tobytes()).decode() if ok else ""


def _row(frames: Frames, found: Found | None, chosen: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    scale = min(SHEET_HEIGHT / frames.shape[1], SHEET_WIDTH / frames.shape[2])
    tiles = []
    for f in chosen:
        size = (max(1, round(frames.shape[2] * scale)), max(1, round(frames.shape[1] * scale)))
        tile = np.ascontiguousarray(cv2.resize(frames[f], size, interpolation=cv2.INTER_AREA))
        for region, tracks in (found.tracks if found is not None else {}).items():
            for track in tracks:
                if region in COLOURS and f < len(track.boxes) and track.found[f]:
                    x0, y0, x1, y1 = np.round(track.boxes[f] * scale).astype(int).tolist()
                    cv2.rectangle(tile, (x0, y0), (x1, y1), COLOURS[region], 1, cv2.LINE_AA)
        tiles.append(tile)
    return np.concatenate(tiles, axis=1)
