# SPDX-License-Identifier: Apache-2.0
"""Draws scenes of the synthetic world with OpenCV: antialiased polygons at twice the resolution, then area averaging.

Known truth of every drawn frame: mouth opening and width (the visemes given), speaker, expression, identity, and the
box of each mouth (`mouth_boxes`). A person is drawn in a unit square: head at (0.5, 0.42), shoulders below 0.76.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from talkingdit.puppets.world import (
    BACKGROUND,
    EYES,
    HAIR,
    LOGO_COLOUR,
    SHIRT,
    SKIN,
    Character,
    Colour,
    FloatArray,
    Motion,
    Scene,
)

Image = NDArray[np.uint8]
Points = NDArray[np.float64]

MOUTH_INTERIOR: Colour = (58, 8, 24)
LIPS: Colour = (186, 62, 72)

HEAD = (0.5, 0.42)
HEAD_RADII = (0.235, 0.285)
MOUTH_Y = 0.555
MOUTH_HEIGHT = 0.15  # of a fully open mouth: 14.4 pixels in a 96-pixel frame
MOUTH_UP = 0.3  # share of the opening above the resting line; the jaw takes the rest
LIP_THICKNESS = 0.014
PROFILE_SHIFT = 0.09  # how far the features move towards the side a turned head looks to


@dataclass(frozen=True)
class Expression:
    """An expression as numbers: mouth corners (positive = up), inner and outer brow height, eye opening, brow tilt."""

    corner_left: float = 0.0
    corner_right: float = 0.0
    brow_inner: float = 0.0
    brow_outer: float = 0.0
    eye: float = 1.0
    nose: float = 0.0


FACES: dict[str, Expression] = {
    "neutral": Expression(),
    "happy": Expression(corner_left=0.035, corner_right=0.035, brow_inner=0.01, brow_outer=0.01, eye=0.85),
    "sad": Expression(corner_left=-0.03, corner_right=-0.03, brow_inner=0.03, brow_outer=-0.02, eye=0.8),
    "angry": Expression(corner_left=-0.02, corner_right=-0.02, brow_inner=-0.035, brow_outer=0.02, eye=0.8),
    "surprised": Expression(brow_inner=0.045, brow_outer=0.045, eye=1.4),
    "fear": Expression(corner_left=-0.02, corner_right=-0.02, brow_inner=0.045, brow_outer=0.0, eye=1.3),
    "disgust": Expression(
        corner_left=-0.015, corner_right=-0.015, brow_inner=-0.025, brow_outer=-0.015, eye=0.55, nose=1.0
    ),
    "contempt": Expression(corner_left=-0.005, corner_right=0.04, brow_inner=0.0, brow_outer=0.0, eye=0.75),
}

_SUPERSAMPLE = 2
_SHIFT = 6  # sub-pixel bits of OpenCV's fixed-point coordinates
_ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)


class _Canvas:
    """Polygons in the unit square of one person, mapped into the frame."""

    def __init__(self, image: Image, x: float, y: float, scale: float) -> None:
        self.image, self.scale = image, scale
        self.origin = np.array([x - 0.5 * scale, y])
        self.pixels = image.shape[0] * (1 << _SHIFT)

    def polygon(self, points: Points, colour: Colour) -> None:
        # OpenCV puts pixel centres on integers, the world puts pixel edges there.
        mapped = (self.origin + points * self.scale) * self.pixels - (1 << (_SHIFT - 1))
        cv2.fillPoly(self.image, [np.round(mapped).astype(np.int32)], colour, cv2.LINE_AA, _SHIFT)

    def ellipse(self, centre: Sequence[float] | Points, radii: Sequence[float], colour: Colour) -> None:
        self.polygon(np.asarray(centre) + _CIRCLE * np.asarray(radii), colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        self.polygon(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), colour)


def mouth_outline(opening: float, width: float, face: Expression, margin: float = 0.0) -> Points:
    """Outline of the mouth around its resting point: [40, 2], `margin` widens it (the lips)."""
    half = 0.062 + 0.045 * width + margin
    up = MOUTH_UP * MOUTH_HEIGHT * opening + margin
    down = (1 - MOUTH_UP) * MOUTH_HEIGHT * opening + margin
    x, y = _CIRCLE[:, 0], _CIRCLE[:, 1]
    corner = np.where(x < 0, face.corner_left, face.corner_right)
    return np.stack([half * x, np.where(y < 0, up, down) * y - corner * np.abs(x) ** 3], 1)


def _shade(colour: Colour, factor: float) -> Colour:
    return (int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor))


def _logo(canvas: _Canvas, character: Character, x: float) -> None:
    centre, radius = np.array([x, 0.9]), 0.062
    if character.logo == "circle":
        points = centre + radius * _CIRCLE
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}[character.logo]
        turn = np.pi / 4 if character.logo == "square" else -np.pi / 2
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        radii = np.where(np.arange(corners) % 2, 0.45, 1.1) if character.logo == "star" else np.full(corners, 1.1)
        points = centre + radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    canvas.polygon(points, LOGO_COLOUR[character.logo_colour])


def _hair_behind(canvas: _Canvas, character: Character, head: Points) -> None:
    colour = HAIR[character.hair]
    if character.hair_style == "long":
        canvas.ellipse(head + (0, 0.06), (HEAD_RADII[0] + 0.065, HEAD_RADII[1] + 0.06), colour)
        canvas.box(head[0] - 0.3, head[1] + 0.06, head[0] + 0.3, head[1] + 0.36, colour)
    elif character.hair_style == "bun":
        canvas.ellipse(head + (0, -0.33), (0.1, 0.085), colour)


def _hair_front(canvas: _Canvas, character: Character, head: Points) -> None:
    colour, (rx, ry) = HAIR[character.hair], HEAD_RADII
    angles = np.linspace(np.pi * 1.02, np.pi * 1.98, 25)  # odd, so that spikes mirror
    outer = np.stack([np.cos(angles) * (rx + 0.03), np.sin(angles) * (ry + 0.03)], 1)
    if character.hair_style == "spiky":
        outer[1:-1:2] *= 1.22
    inner = np.stack([np.cos(angles) * rx * 0.93, np.sin(angles) * ry * 0.58], 1)[::-1]
    canvas.polygon(head + np.concatenate([outer, inner]), colour)


def _features(
    canvas: _Canvas,
    character: Character,
    head: Points,
    face: Expression,
    opening: float,
    width: float,
    eyelids: float,
    shift: float,
) -> None:
    """Eyes, brows, nose and mouth; `shift` is 0 in a front view, signed towards the side looked to in a turned head."""
    squeeze = 1.0 if shift == 0 else 0.72
    brow_colour = _shade(HAIR[character.hair], 0.7)
    for side in (-1, 1):
        if shift * side < 0:
            continue  # the far eye of a turned head is hidden
        x = side * 0.098 * squeeze + shift
        eye = max(0.05, face.eye * eyelids)
        canvas.ellipse(head + (x, -0.035), (0.046 * squeeze, 0.043 * eye), (252, 252, 252))
        if eye > 0.2:
            canvas.ellipse(head + (x, -0.035), (0.024 * squeeze, min(0.028, 0.04 * eye)), EYES[character.eyes])
        inner = np.array([x - side * 0.055 * squeeze, -0.108 - face.brow_inner])
        outer = np.array([x + side * 0.055 * squeeze, -0.108 - face.brow_outer])
        thick = np.array([0, 0.022])
        canvas.polygon(head + np.stack([inner, outer, outer + thick, inner + thick]), brow_colour)
    nose = _shade(SKIN[character.skin], 0.82)
    canvas.ellipse(head + (shift * 1.25, 0.045), (0.022 + 0.014 * face.nose, 0.02), nose)
    mouth = head + (shift * 1.1, MOUTH_Y - HEAD[1])
    scale = np.array([squeeze, 1.0])
    canvas.polygon(mouth + scale * mouth_outline(opening, width, face, LIP_THICKNESS), LIPS)
    if opening > 0.02:
        canvas.polygon(mouth + scale * mouth_outline(opening, width, face), MOUTH_INTERIOR)


def _person(
    canvas: _Canvas,
    character: Character,
    expression: str,
    viewpoint: str,
    opening: float,
    width: float,
    offset: tuple[float, float],
    eyelids: float,
) -> None:
    skin, shirt = SKIN[character.skin], SHIRT[character.shirt]
    head = np.array(HEAD) + offset
    _hair_behind(canvas, character, head)
    body = np.array([0.5 + 0.35 * offset[0], 0.0])
    shoulders = np.array(
        [
            [-0.42, 2.0],  # who stands behind others is seen below the own square
            [-0.42, 1.02],
            [-0.38, 0.86],
            [-0.28, 0.79],
            [-0.1, 0.75],
            [0.1, 0.75],
            [0.28, 0.79],
            [0.38, 0.86],
            [0.42, 1.02],
            [0.42, 2.0],
        ]
    )
    canvas.box(head[0] - 0.09, head[1] + 0.2, head[0] + 0.09, 0.78, _shade(skin, 0.86))
    canvas.polygon(body + shoulders, shirt)
    if viewpoint != "back":
        _logo(canvas, character, 0.5 + 0.35 * offset[0])
    if viewpoint == "back":
        canvas.ellipse(head, HEAD_RADII, HAIR[character.hair])
        _hair_front(canvas, character, head)
        return
    canvas.ellipse(head, HEAD_RADII, skin)
    shift = {"front": 0.0, "left": -PROFILE_SHIFT, "right": PROFILE_SHIFT}[viewpoint]
    _features(canvas, character, head, FACES[expression], opening, width, eyelids, shift)
    if shift:  # a turned head shows its hair on the far side
        side = np.linspace(-np.pi / 2, np.pi / 2, 16)
        edge = np.stack([np.cos(side) * (HEAD_RADII[0] + 0.03), np.sin(side) * (HEAD_RADII[1] + 0.02)], 1)
        inner = np.stack([np.cos(side) * 0.09, np.sin(side) * HEAD_RADII[1]], 1)[::-1]
        points = np.concatenate([edge, inner]) * (-np.sign(shift), 1)
        canvas.polygon(head + points, HAIR[character.hair])
    _hair_front(canvas, character, head)


def _backdrop(scene: Scene, side: int, phase: float) -> Image:
    colour = BACKGROUND[scene.background]
    image = np.empty((side, side, 3), np.uint8)
    image[:] = colour
    if scene.moving_background:
        canvas = _Canvas(image, 0.5, 0.0, 1.0)
        for band in range(3):
            x = (phase + band / 3) % 1.0 * 1.4 - 0.2
            canvas.ellipse((x, 0.2 + 0.22 * band), (0.13, 0.13), _shade(colour, 0.86))
    return image


def render(
    scene: Scene,
    openings: FloatArray,
    widths: FloatArray,
    motion: Sequence[Motion],
    size: int = 96,
) -> Image:
    """Draw a scene frame by frame.

    Args:
        openings, widths: mouth of each person, [people, F], 0 (closed, narrow) to 1 (open, wide).
        motion: one `Motion` of F frames per person; the first one's `phase` moves the background.
        size: frame side in pixels, at least 32.

    Returns:
        frames [F, size, size, 3], uint8 RGB.

    Raises:
        ValueError: shapes that do not fit the scene.
    """
    people = len(scene.characters)
    if openings.ndim != 2 or openings.shape != widths.shape or openings.shape[0] != people:
        raise ValueError(
            f"render: openings and widths must both be [people={people}, F], got {openings.shape} and {widths.shape}"
        )
    frames = openings.shape[1]
    if len(motion) != people or any(len(m.dx) != frames for m in motion):
        raise ValueError(f"render: motion must hold {people} Motion of {frames} frames")
    if size < 32:
        raise ValueError(f"render: size must be at least 32 pixels, got {size}")
    out = np.empty((frames, size, size, 3), np.uint8)
    back_to_front = sorted(enumerate(scene.placements()), key=lambda person: person[1][1])
    for f in range(frames):
        image = _backdrop(scene, size * _SUPERSAMPLE, float(motion[0].phase[f]))
        for p, (x, y, scale) in back_to_front:
            _person(
                _Canvas(image, x, y, scale),
                scene.characters[p],
                scene.expressions[p],
                scene.viewpoint,
                float(openings[p, f]),
                float(widths[p, f]),
                (float(motion[p].dx[f]), float(motion[p].dy[f])),
                float(motion[p].eyelids[f]),
            )
        out[f] = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return out


def mouth_boxes(scene: Scene, motion: Sequence[Motion]) -> FloatArray:
    """Box of each mouth, wide open or not: [people, F, 4] as (x0, y0, x1, y1) in frame sizes."""
    shift = {"left": -PROFILE_SHIFT, "right": PROFILE_SHIFT}.get(scene.viewpoint, 0.0) * 1.1
    boxes = []
    for (x, y, scale), m in zip(scene.placements(), motion, strict=True):
        cx = x + (shift + m.dx) * scale
        cy = y + (MOUTH_Y + m.dy) * scale
        boxes.append(np.stack([cx - 0.13 * scale, cy - 0.08 * scale, cx + 0.13 * scale, cy + 0.13 * scale], 1))
    return np.stack(boxes).astype(np.float32)
