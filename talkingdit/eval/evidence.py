# SPDX-License-Identifier: Apache-2.0
"""What metrics look at: one generated video with its truth, regions found in both, features; each computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from talkingdit.eval.clip import EvalClip, Frames
from talkingdit.eval.found import Finder, Found
from talkingdit.eval.slots import Backbone
from talkingdit.eval.tracks import Track, crops, match

FloatArray = npt.NDArray[np.float64]

CROP = 256  # pixels of a region's square
MARGINS = {"face": 2.0, "hands": 2.0, "left_hand": 2.0, "right_hand": 2.0, "body": 1.0}  # as in the published protocol


class NotMeasured(Exception):
    """A metric has no value for this video; the text says why."""


@dataclass(frozen=True)
class RegionView:
    """One region of a video and of its truth, of one person.

    Attributes:
        gen: uint8 [F, h, w, 3] RGB.
        truth: likewise, of the same size; None without a truth.
        visible: [F], frames in which the region was found in both (in the video alone without a truth).
        person: which of the people in the video.
        native: pixels of the video that a side of `gen` shows; fewer than it has where crops are enlarged.
    """

    gen: Frames
    truth: Frames | None
    visible: npt.NDArray[np.bool_]
    person: int = 0
    native: int = 0

    def need_truth(self) -> Frames:
        if self.truth is None:
            raise NotMeasured("needs a true video")
        return self.truth


@dataclass
class Evidence:
    """One video, its truth and what is known of both.

    Args:
        gen: the video that is judged.
        truth: what it should be, on the same time line, or None.
        finder: looks for people.
        regions: that will be asked for.
        backbones: by slot.
        text: words that are spoken, or "".
        truth_key: tells the true video from others in this process, so that several systems' videos share what was
            found in it; "" where nothing is shared.
    """

    gen: EvalClip
    truth: EvalClip | None
    finder: Finder
    regions: frozenset[str]
    backbones: Mapping[str, Backbone] = field(default_factory=dict)
    text: str = ""
    truth_key: str = ""
    _views: dict[str, list[RegionView]] = field(default_factory=dict)
    _features: dict[tuple[str, str, int, bool], FloatArray] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Frames that both have."""
        return len(self.gen.frames) if self.truth is None else min(len(self.gen.frames), len(self.truth.frames))

    @cached_property
    def found(self) -> Found:
        return self.finder(self.gen, self.regions)

    @cached_property
    def found_in_truth(self) -> Found:
        if self.truth is None:
            raise NotMeasured("needs a true video")
        if self.truth is self.gen:
            return self.found
        if not self.truth_key:
            return self.finder(self.truth, self.regions)
        key = (self.truth_key, len(self.truth.frames), self.truth.fps, self.finder.name, self.regions)
        if key not in _FOUND:
            while len(_FOUND) >= MOST_FOUND:
                del _FOUND[next(iter(_FOUND))]
            _FOUND[key] = self.finder(self.truth, self.regions)
        return _FOUND[key]

    @cached_property
    def partners(self) -> dict[str, list[int]]:
        """For each track of the truth the video's track in its place, by region; -1 where there is none."""
        if self.truth is None:
            return {}
        sizes = self.truth.frames.shape[1:3], self.gen.frames.shape[1:3]
        return {
            region: match(tracks, sizes[0], self.found.tracks.get(region, ()), sizes[1])
            for region, tracks in self.found_in_truth.tracks.items()
        }

    def views(self, region: str) -> list[RegionView]:
        """The region of every person; of "whole" there is one.

        Raises:
            NotMeasured: nobody has it.
        """
        if region not in self._views:
            self._views[region] = [self._whole()] if region == "whole" else list(self._cut(region))
        if not self._views[region]:
            raise NotMeasured(f"no {region.replace('_', ' ')} was found")
        return self._views[region]

    def network(self, slot: str) -> Any:
        """The network of a slot, made when it is first asked for.

        Raises:
            NotMeasured: the slot is empty.
        """
        if slot not in self.backbones:
            raise NotMeasured(f"the slot {slot} is empty")
        key = f"{slot}/{self.backbones[slot].id}/{self.backbones[slot].version}"
        if key not in _NETWORKS:
            _NETWORKS[key] = self.backbones[slot].load()
        return _NETWORKS[key]

    def features(
        self, slot: str, region: str, view: RegionView, of_truth: bool, chosen: npt.NDArray[np.int64]
    ) -> FloatArray:
        """Features [n, d] of chosen frames of a view, computed once."""
        key = (f"{slot}:{hash(chosen.tobytes())}", region, view.person, of_truth)
        if key not in self._features:
            frames = view.need_truth() if of_truth else view.gen
            self._features[key] = self.network(slot)(frames[chosen])
        return self._features[key]

    def _whole(self) -> RegionView:
        n = self.frames
        if self.truth is None:
            return RegionView(self.gen.frames[:n], None, np.ones(n, bool))
        size = self.truth.frames.shape[1:3]
        gen = self.gen.frames[:n]
        if gen.shape[1:3] != size:
            how = cv2.INTER_AREA if gen.shape[1] > size[0] else cv2.INTER_LINEAR
            gen = np.stack([cv2.resize(frame, (size[1], size[0]), interpolation=how) for frame in gen])
        return RegionView(gen, self.truth.frames[:n], np.ones(n, bool))

    def _cut(self, region: str) -> list[RegionView]:
        n, margin = self.frames, MARGINS[region]
        if self.truth is None:
            tracks = self.found.tracks.get(region, ())
            return [
                RegionView(
                    crops(self.gen.frames[:n], track, CROP, margin),
                    None,
                    track.found[:n],
                    person,
                    _native(track, margin),
                )
                for person, track in enumerate(tracks)
            ]
        views = []
        for person, (true, partner) in enumerate(
            zip(self.found_in_truth.tracks.get(region, ()), self.partners.get(region, []), strict=True)
        ):
            if partner < 0:
                continue  # told by the metric `found`
            track = self.found.tracks[region][partner]
            gen = crops(self.gen.frames[:n], track, CROP, margin)
            views.append(
                RegionView(
                    gen,
                    crops(self.truth.frames[:n], true, CROP, margin),
                    track.found[:n] & true.found[:n],
                    person,
                    _native(track, margin),
                )
            )
        return [view for view in views if view.visible.any()]


def _native(track: Track, margin: float) -> int:
    return max(8, round(margin * float(np.nanmedian((track.boxes[:, 2:] - track.boxes[:, :2]).max(1)))))


_NETWORKS: dict[str, Any] = {}  # of this process
MOST_FOUND = 4  # true videos of which what was found is remembered
_FOUND: dict[tuple[Any, ...], Found] = {}


def spread(shown: npt.NDArray[np.bool_], most: int) -> npt.NDArray[np.int64]:
    """Indices of at most so many of the frames that are shown, evenly spread."""
    indices = np.nonzero(shown)[0]
    if len(indices) <= most:
        return indices
    return indices[np.round(np.linspace(0, len(indices) - 1, most)).astype(np.int64)]
