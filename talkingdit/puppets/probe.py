# SPDX-License-Identifier: Apache-2.0
"""Measures mouth opening, speaker, expression and identity back from frames, drawn or generated.

Everything is analysis by synthesis or linear photometry, nothing is learned, so the probe has no favourites:

- opening: along the columns through the middle of the mouth, each pixel is projected on the line from the skin colour
  (0) to the colour of the mouth's inside (1); the sum over rows is the height of the opening. The sum is linear in the
  pixels, so blur, the usual fault of generated frames, does not bias it;
- identity: skin, hair and shirt colours are medians of fixed regions, named by the nearest palette entry; the hair
  style is the one whose drawing fits best;
- expression: the face is compared with drawings of the eight expressions of the measured identity and opening, with
  mouths of several widths and eyes open and shut, both sides blurred: a generated frame is, and against sharp drawings
  it looks like the expression with the least contrast;
- logo: its shape and colour are those of the drawing that fits best, on a shirt of the measured colour
  (`measure_logo`);
- speaker: of several people, the one whose mouth moves most within half a second.

The layout of the scene is assumed: front view, one person or several, as `Scene.placements` puts them.
`measure_probe_error` states the probe's own error on drawn frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from talkingdit.puppets.render import HEAD, MOUTH_HEIGHT, MOUTH_INTERIOR, MOUTH_UP, MOUTH_Y, Image, render
from talkingdit.puppets.world import (
    EXPRESSIONS,
    HAIR,
    HAIR_STYLES,
    LOGO_COLOUR,
    LOGOS,
    PLACEMENTS,
    SHIRT,
    SKIN,
    Character,
    Colour,
    FloatArray,
    Motion,
    Scene,
)

# Height of lips and rounding that a closed mouth shows, and height per unit of opening, both in frame sizes: measured
# on drawn frames with `measure_probe_error(calibrate=True)`.
CLOSED_HEIGHT = 0.0161
OPENING_HEIGHT = 0.1510

_FACE = (0.3, 0.27, 0.7, 0.68)  # brows, eyes, nose and mouth
_WIDTHS, _EYELIDS = (0.2, 0.5, 0.8), (0.0, 0.5, 1.0)  # of mouth and eyes, as an expression is looked for
_BLUR = 1 / 128  # of frames and drawings then, in frame sizes
_CANONICAL = 96  # persons of a scene of several are resampled to this size before measuring


@dataclass(frozen=True)
class Identity:
    """What makes a person the same person in every frame."""

    skin: str
    hair: str
    hair_style: str
    shirt: str

    @staticmethod
    def of(character: Character) -> Identity:
        return Identity(character.skin, character.hair, character.hair_style, character.shirt)


@dataclass(frozen=True)
class Reading:
    """What the probe measured: arrays over people P and frames F."""

    opening: FloatArray  # [P, F], 0 closed .. 1 fully open (not clipped)
    identity: list[list[Identity]]  # [P][F]
    expression: list[list[str]]  # [P][F]
    speaker: NDArray[np.int64]  # [F], index of the person whose mouth moves most

    def identity_share(self, person: int, character: Character) -> float:
        """Share of frames in which this person is measured to be `character`."""
        wanted = Identity.of(character)
        return float(np.mean([found == wanted for found in self.identity[person]]))

    def expression_share(self, person: int, expression: str) -> float:
        return float(np.mean([found == expression for found in self.expression[person]]))


def _region(frames: Image, x0: float, y0: float, x1: float, y1: float) -> NDArray[np.float32]:
    """Pixels of a box given in frame sizes, clipped to the frame: [F, h, w, 3]."""
    size = frames.shape[1]
    rows = slice(max(0, round(y0 * size)), max(1, round(y1 * size)))
    columns = slice(max(0, round(x0 * size)), max(1, round(x1 * size)))
    return frames[:, rows, columns].astype(np.float32)


def _median_colour(*regions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median colour of every frame over one or more regions: [F, 3]."""
    return np.median(np.concatenate([r.reshape(len(r), -1, 3) for r in regions], axis=1), axis=1)


def _nearest(colours: NDArray[np.float32], palette: dict[str, Colour]) -> list[str]:
    names = list(palette)
    distance = np.linalg.norm(colours[:, None] - np.array([palette[n] for n in names], np.float32), axis=-1)
    return [names[i] for i in distance.argmin(1)]


def _skin_colour(frames: Image) -> NDArray[np.float32]:
    cheeks = [_region(frames, 0.5 + s - 0.03, 0.47, 0.5 + s + 0.03, 0.53) for s in (-0.135, 0.135)]
    return _median_colour(*cheeks)


def _head_shift(frames: Image, skin: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sideways offset of the head in frame sizes, [F]: centre of the skin between the eyes and the mouth."""
    band = _region(frames, 0.18, 0.45, 0.82, 0.51)
    likeness = np.exp(-(np.linalg.norm(band - skin[:, None, None], axis=-1) ** 2) / (2 * 25.0**2)).sum(1)
    x = 0.18 + (np.arange(band.shape[2]) + 0.5) / frames.shape[1]
    return ((likeness * x).sum(1) / (likeness.sum(1) + 1e-6) - HEAD[0]).astype(np.float32)


def measure_height(frames: Image) -> FloatArray:
    """Height of the mouth in frame sizes, lips included, [F]: the raw value behind `Reading.opening`."""
    skin = _skin_colour(frames)
    axis = np.array(MOUTH_INTERIOR, np.float32) - skin
    top, bottom = MOUTH_Y - MOUTH_UP * MOUTH_HEIGHT - 0.02, MOUTH_Y + (1 - MOUTH_UP) * MOUTH_HEIGHT + 0.04
    band = _region(frames, 0.25, top, 0.75, bottom)
    projection = ((band - skin[:, None, None]) * axis[:, None, None]).sum(-1) / (axis**2).sum(-1)[:, None, None]
    heights = projection.sum(1) / frames.shape[1]  # [F, columns]
    x = 0.25 + (np.arange(band.shape[2]) + 0.5) / frames.shape[1]
    centre = HEAD[0] + _head_shift(frames, skin)
    weight = np.clip(1.5 - np.abs(x[None] - centre[:, None]) / 0.02, 0, 1)
    return ((heights * weight).sum(1) / weight.sum(1)).astype(np.float32)


def _template(frames: Image, drawings: Image, box: tuple[float, float, float, float], reach: int) -> NDArray[np.int64]:
    """For every frame the index of the drawing that fits best inside `box`, letting it slide by `reach` pixels."""
    templates = _cut(drawings, box)
    return np.array(
        [
            np.argmin([cv2.matchTemplate(area, t, cv2.TM_SQDIFF).min() for t in templates])
            for area in _cut(frames, box, reach)
        ]
    )


def _cut(frames: Image, box: tuple[float, float, float, float], reach: int = 0) -> Image:
    """Pixels of a box given in frame sizes, and `reach` pixels around it."""
    x0, y0, x1, y1 = (round(v * frames.shape[1]) for v in box)
    return frames[:, max(0, y0 - reach) : y1 + reach, max(0, x0 - reach) : x1 + reach]


def _draw(
    who: Identity,
    size: int,
    expression: str = "neutral",
    opening: float = 0.0,
    logo: tuple[str, str] = ("circle", "white"),
    width: float = 0.5,
    eyelids: float = 1.0,
) -> Image:
    """The probe's own drawing of somebody, [size, size, 3]; the colour of the eyes is not measured."""
    character = Character(who.skin, who.hair_style, who.hair, who.shirt, *logo, "brown")
    mouth = np.array([[opening]], np.float32)
    motion = replace(Motion.still(1), eyelids=np.full(1, eyelids, np.float32))
    return render(Scene((character,), (expression,)), mouth, np.full_like(mouth, width), [motion], size)[0]


def _hair_styles(frames: Image, looks: list[tuple[str, str, str]], backdrop: NDArray[np.float32]) -> list[str]:
    styles = [""] * len(frames)
    for look in set(looks):
        members = [i for i, other in enumerate(looks) if other == look]
        skin, hair, shirt = look
        drawings = np.stack([_draw(Identity(skin, hair, s, shirt), frames.shape[1]) for s in HAIR_STYLES])
        # The drawing's own backdrop is replaced by the measured one, which must not decide.
        plain = np.all(drawings == drawings[0, 0, 0], axis=-1)
        drawings[plain] = np.clip(backdrop, 0, 255).astype(np.uint8)
        for i, style in zip(members, _template(frames[members], drawings, (0.12, 0.03, 0.88, 0.74), 2), strict=True):
            styles[i] = HAIR_STYLES[style]
    return styles


def _expressions(frames: Image, identities: list[Identity], opening: FloatArray) -> list[str]:
    found = [""] * len(frames)
    levels = np.clip(np.round(opening * 5), 0, 5).astype(int)
    size = frames.shape[1]
    areas = _cut(_blurred(frames), _FACE, 3)
    for key in set(zip(identities, levels.tolist(), strict=True)):
        who, level = key
        looks = [(e, width, eyelids) for e in EXPRESSIONS for width in _WIDTHS for eyelids in _EYELIDS]
        drawings = [_draw(who, size, e, level / 5, width=w, eyelids=lids) for e, w, lids in looks]
        templates = _cut(_blurred(np.stack(drawings)), _FACE)
        for i in range(len(frames)):
            if (identities[i], levels[i]) == key:
                misfits = [cv2.matchTemplate(areas[i], t, cv2.TM_SQDIFF).min() for t in templates]
                found[i] = looks[int(np.argmin(misfits))][0]
    return found


def _blurred(frames: Image) -> Image:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), frames.shape[1] * _BLUR) for frame in frames])


def _shirts(frames: Image, behind: bool) -> list[str]:
    outer, inner = (0.34, 0.41) if behind else (0.2, 0.36)  # heads in front hide the shoulders
    sides = _region(frames, outer, 0.88, inner, 0.97), _region(frames, 1 - inner, 0.88, 1 - outer, 0.97)
    return _nearest(_median_colour(*sides), SHIRT)


def _measure_person(frames: Image, behind: bool) -> tuple[FloatArray, list[Identity], list[str]]:
    opening = ((measure_height(frames) - CLOSED_HEIGHT) / OPENING_HEIGHT).astype(np.float32)
    skins = _nearest(_skin_colour(frames), SKIN)
    hairs = _nearest(_median_colour(_region(frames, 0.42, 0.15, 0.58, 0.22)), HAIR)
    shirts = _shirts(frames, behind)
    backdrop = _median_colour(_region(frames, 0.0, 0.02, 0.08, 0.3), _region(frames, 0.92, 0.02, 1.0, 0.3)).mean(0)
    looks = list(zip(skins, hairs, shirts, strict=True))
    styles = _hair_styles(frames, looks, backdrop)
    identities = [Identity(skin, hair, style, shirt) for (skin, hair, shirt), style in zip(looks, styles, strict=True)]
    return opening, identities, _expressions(frames, identities, opening)


def probe(frames: Image, people: int = 1, fps: int = 16) -> Reading:
    """Measure every person of a front-view scene in every frame.

    Args:
        frames: [F, H, W, 3] uint8 RGB, square.
        people: one to three, placed as in `Scene.placements`.
        fps: frame rate, for the half second over which a speaker is decided.

    Raises:
        ValueError: frames of another shape or type.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.shape[1] != frames.shape[2] or frames.dtype != np.uint8:
        raise ValueError(f"probe: frames must be square uint8 RGB [F, S, S, 3], got {frames.dtype} {frames.shape}")
    crops, placements = [frames], PLACEMENTS[people]
    if people > 1:
        size = frames.shape[1]
        crops = []
        for x, y, scale in placements:
            matrix = np.array([[scale, 0, (x - 0.5 * scale) * size], [0, scale, y * size]], np.float32)
            matrix[:, :2] *= size / _CANONICAL
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            warped = [
                cv2.warpAffine(f, matrix, (_CANONICAL, _CANONICAL), flags=flags, borderMode=cv2.BORDER_REPLICATE)
                for f in frames
            ]
            crops.append(np.stack(warped))
    front = max(y for _, y, _ in placements)
    measured = [_measure_person(crop, y < front) for crop, (_, y, _) in zip(crops, placements, strict=True)]
    opening = np.stack([m[0] for m in measured])
    speed = np.abs(np.diff(opening, axis=1, prepend=opening[:, :1]))
    kernel = np.ones(max(1, fps // 2))
    activity = np.stack([np.convolve(s, kernel, "same") for s in speed])
    return Reading(
        opening=opening,
        identity=[m[1] for m in measured],
        expression=[m[2] for m in measured],
        speaker=activity.argmax(0),
    )


def measure_logo(frames: Image) -> list[tuple[str, str]]:
    """Shape and colour of the logo of one person in front view, in every frame.

    Args:
        frames: [F, S, S, 3] uint8 RGB.
    """
    found = [("", "")] * len(frames)
    shirts = _shirts(frames, behind=False)
    for shirt in set(shirts):
        members = [i for i, other in enumerate(shirts) if other == shirt]
        looks = [(shape, colour) for shape in LOGOS for colour in LOGO_COLOUR if colour != shirt]
        who = Identity(next(iter(SKIN)), next(iter(HAIR)), HAIR_STYLES[0], shirt)
        drawings = np.stack([_draw(who, frames.shape[1], logo=look) for look in looks])
        for i, best in zip(members, _template(frames[members], drawings, (0.41, 0.82, 0.59, 0.98), 2), strict=True):
            found[i] = looks[best]
    return found


def measure_probe_error(
    scenes: int = 64, frames: int = 32, size: int = 96, seed: int = 0, calibrate: bool = False
) -> dict[str, float]:
    """The probe's own error on drawn frames with random openings, sway and blinks (known truth).

    Returns correlation `r`, `slope` and `rms` of the opening, share of frames with the right `identity` and
    `expression`; with `calibrate`, the raw height's `closed_height` and `opening_height` for the constants above.
    """
    rng = np.random.default_rng(seed)
    truth, heights, identity, expression = [], [], [], []
    for _ in range(scenes):
        scene = Scene.random(rng)
        openings = rng.random((1, frames)).astype(np.float32)
        openings[0, rng.random(frames) < 0.2] = 0
        widths = rng.random((1, frames)).astype(np.float32)
        drawn = render(scene, openings, widths, [Motion.random(rng, frames)], size)
        truth.append(openings[0])
        heights.append(measure_height(drawn))
        if not calibrate:
            reading = probe(drawn)
            identity.append(reading.identity_share(0, scene.characters[0]))
            expression.append(reading.expression_share(0, scene.expressions[0]))
    wanted, height = np.concatenate(truth), np.concatenate(heights)
    if calibrate:
        slope, intercept = np.polyfit(wanted, height, 1)
        return {"closed_height": float(intercept), "opening_height": float(slope)}
    got = (height - CLOSED_HEIGHT) / OPENING_HEIGHT
    return {
        "r": float(np.corrcoef(wanted, got)[0, 1]),
        "slope": float(np.polyfit(wanted, got, 1)[0]),
        "rms": float(np.sqrt(np.mean((got - wanted) ** 2))),
        "identity": float(np.mean(identity)),
        "expression": float(np.mean(expression)),
    }
