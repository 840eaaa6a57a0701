# SPDX-License-Identifier: Apache-2.0
"""More ablations of Gloria: what anchors are for where words say nothing of looks, see `bench.gloria_rows`.

Words say mood and side alone, in training and afterwards; a model that reads no anchors cannot know what it has not
seen in the frame before. All rows are given more views than the paper's ratios have, and more clips turn round.

anchors are used, not copied the first frame shows the back, the words ask for the front, an anchor has the front
                             in front of another background: are person and logo right, is the anchor's background
                             not in the video, and is no frame nearer to an anchor than a right one would be? The
                             row "no_view_anchor" is the full model without that anchor.
weak condition               the same with an anchor of an expression beside it: are both right?
anchors hold it alone        the long video of `bench.gloria_rows`, of somebody whom words do not describe
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bench.ablations import Budget, Claim, Measured, Row, Study
from bench.drawn_anchors import KIND_OF, SILENT, head_of, held_out_scene, other_shot, silent_words, still
from bench.gloria_rows import (
    CLIP_LATENTS,
    VideoCase,
    backdrop,
    global_anchor,
    hold_identity,
    maker,
    prepare,
    right_video,
)
from talkingdit.families.gloria.outline import AnchorImage
from talkingdit.puppets.probe import measure_logo, probe
from talkingdit.puppets.render import Image
from talkingdit.puppets.world import BACKGROUND

NAME = "gloria_silent"


def anchor_distance(frames: Image, anchors: Sequence[Image]) -> float:
    """Over frames [F, S, S, 3] the mean absolute difference of pixels to the nearest anchor [h, w, 3], 0..1."""
    size = frames.shape[2], frames.shape[1]
    shown = [cv2.resize(anchor, size).astype(np.float32) for anchor in anchors]
    away = [[np.abs(frame - anchor).mean() / 255 for anchor in shown] for frame in frames]
    return float(np.min(away, axis=1).mean())


def _turned(row: Row, model: Path, budget: Budget, mood: bool) -> Measured:
    """From the back to the front, which an anchor shows in front of another background; some rows are not given it."""
    make = maker(row, model)
    found: dict[str, list[float]] = {}
    for case in range(budget.cases):
        rng = np.random.default_rng([7, case])
        scene, who = held_out_scene(2000 + case)
        first = still(scene.with_viewpoint("back"), rng)
        shot = other_shot(scene, rng, viewpoint="front", expressions=("neutral",))
        anchors = (*global_anchor(first, row), AnchorImage("view", "front", still(shot, rng)))
        if mood:
            face = other_shot(scene, rng, viewpoint="front", expressions=scene.expressions)
            kind = KIND_OF[scene.expressions[0]]
            anchors += (AnchorImage("expression", kind, head_of(still(face, rng))),)
        given = tuple(anchor for anchor in anchors if anchor.type not in row.options.get("without", ()))
        ask = VideoCase(first, scene, silent_words(scene), given, 4 * CLIP_LATENTS + 1, budget.seed + case)
        late, right = (video[len(video) // 2 :] for video in (make(ask), right_video(ask)))
        own, other = (np.array(BACKGROUND[name]) for name in (scene.background, shot.background))
        seen, reading, images = backdrop(late), probe(late), [anchor.image for anchor in anchors]
        one = {
            "logo_right": np.mean([look == (who.logo, who.logo_colour) for look in measure_logo(late)]),
            "identity": reading.identity_share(0, who),
            "copy_rate": np.mean(np.abs(seen - other).sum(1) < np.abs(seen - own).sum(1)),
            "anchor_distance": anchor_distance(late, images),
            "right_distance": anchor_distance(right, images),
        }
        if mood:
            one["expression_right"] = reading.expression_share(0, scene.expressions[0])
        for name, value in one.items():
            found.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in found.items()}


def use_anchors(row: Row, model: Path, budget: Budget) -> Measured:
    return _turned(row, model, budget, mood=False)


def tell_apart(row: Row, model: Path, budget: Budget) -> Measured:
    return _turned(row, model, budget, mood=True)


def _row(name: str, config: Mapping[str, Any] | None = None) -> Row:
    """Given most views of a clip, as these are asked for."""
    return Row(name, {"conditions.anchors.most": {"global": 1, "view": 3, "expression": 2}, **(config or {})})


EQUAL = {"global": 30.0, "view": 30.0, "expression": 30.0}
STUDY = Study(
    name=NAME,
    config="gloria_drawn.toml",
    rows=(
        _row("full"),
        _row("no_superset", {"conditions.anchors.of": "clip"}),
        _row("equal_offsets", {"model.settings.anchor_offsets": EQUAL, "model.settings.anchor_step": 0.0}),
        Row("no_view_anchor", options={"without": ("view",)}, model="full"),
        Row("right_videos", trained=False),
    ),
    claims=(
        Claim(
            "anchors_are_used_not_copied",
            "anchors from outside of the clip are looked things up in, not copied",
            ("full", "no_view_anchor", "no_superset", "right_videos"),
            use_anchors,
            {"identity": True, "logo_right": True, "copy_rate": False},
        ),
        Claim(
            "weak_condition_separates_anchors",
            "places in time keep anchors of two types apart",
            ("full", "equal_offsets", "right_videos"),
            tell_apart,
            {"logo_right": True, "expression_right": True},
        ),
        Claim(
            "anchors_hold_identity_alone",
            "a global anchor keeps somebody over minutes whom words do not describe",
            ("full", "no_superset", "right_videos"),
            functools.partial(hold_identity, words=silent_words),
            {"identity_end": True, "background_end": True},
        ),
    ),
    prepare=functools.partial(prepare, NAME, SILENT),
)
