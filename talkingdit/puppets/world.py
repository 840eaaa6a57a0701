# SPDX-License-Identifier: Apache-2.0
"""The synthetic world: who can appear, how they can look, move and feel, and how a scene is described in words.

Everything here is data with known truth. `render.py` draws it, `probe.py` measures it back from frames.
Lengths are in units of the frame size (1.0 = one frame side), colours are RGB 0..255, rates are video frames.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
FloatArray = NDArray[np.float32]

SKIN: dict[str, Colour] = {  # at least 65 apart, so that a slight tint of a generated face makes nobody another
    "pale": (255, 228, 206),
    "rosy": (244, 168, 170),
    "tan": (230, 160, 96),
    "olive": (168, 176, 112),
    "brown": (158, 108, 70),
}
HAIR: dict[str, Colour] = {
    "black": (42, 36, 44),
    "brown": (112, 66, 34),
    "blond": (236, 204, 84),
    "red": (206, 66, 34),
    "grey": (152, 154, 160),
    "blue": (58, 88, 206),
    "green": (54, 150, 84),
    "pink": (232, 112, 176),
}
SHIRT: dict[str, Colour] = {
    "red": (206, 44, 50),
    "orange": (238, 138, 36),
    "yellow": (242, 216, 66),
    "green": (56, 158, 76),
    "teal": (36, 164, 176),
    "blue": (46, 84, 206),
    "purple": (128, 62, 182),
    "white": (240, 240, 242),
    "black": (48, 48, 54),
}
LOGO_COLOUR: dict[str, Colour] = {"white": SHIRT["white"], "black": SHIRT["black"], "yellow": SHIRT["yellow"]}
BACKGROUND: dict[str, Colour] = {
    "sky": (196, 218, 236),
    "mint": (212, 234, 212),
    "sand": (238, 226, 206),
    "lilac": (224, 214, 236),
    "mist": (204, 208, 212),
}
EYES: dict[str, Colour] = {"brown": (92, 56, 30), "blue": (50, 100, 170), "green": (50, 120, 70)}
HAIR_STYLES = ("short", "long", "bun", "spiky")
LOGOS = ("circle", "square", "triangle", "star")
EXPRESSIONS = ("neutral", "happy", "sad", "angry", "surprised", "fear", "disgust", "contempt")
VIEWPOINTS = ("front", "left", "right", "back")

Viewpoint = Literal["front", "left", "right", "back"]

HELD_OUT_SHARE = 0.15
# Where people stand, by their number: (x, y, scale). The second of three stands behind the others, so that faces of
# three have as many pixels as those of two.
PLACEMENTS: dict[int, tuple[tuple[float, float, float], ...]] = {
    1: ((0.5, 0.0, 1.0),),
    2: ((0.27, 0.38, 0.62), (0.73, 0.38, 0.62)),
    3: ((0.23, 0.38, 0.62), (0.5, -0.02, 0.62), (0.77, 0.38, 0.62)),
}


@dataclass(frozen=True)
class Character:
    """An identity: what stays the same in every video of this person."""

    skin: str
    hair_style: str
    hair: str
    shirt: str
    logo: str
    logo_colour: str
    eyes: str

    @staticmethod
    def random(rng: np.random.Generator, split: Literal["train", "held_out", "any"] = "any") -> Character:
        """Draw a character; `split` restricts it to those seen in training or never seen there."""
        while True:
            shirt = str(rng.choice(list(SHIRT)))
            character = Character(
                skin=str(rng.choice(list(SKIN))),
                hair_style=str(rng.choice(HAIR_STYLES)),
                hair=str(rng.choice(list(HAIR))),
                shirt=shirt,
                logo=str(rng.choice(LOGOS)),
                logo_colour=str(rng.choice([c for c in LOGO_COLOUR if c != shirt])),
                eyes=str(rng.choice(list(EYES))),
            )
            if split == "any" or character.held_out == (split == "held_out"):
                return character

    @property
    def held_out(self) -> bool:
        """Whether the character belongs to the 15 % never drawn for training.

        The rule hashes the four attributes that make an identity (skin, hair, hair style, shirt), so a held-out
        character is a combination that no training video has shown, whatever its logo or eyes.
        """
        key = f"{self.skin}|{self.hair_style}|{self.hair}|{self.shirt}"
        return zlib.crc32(key.encode()) % 1000 < HELD_OUT_SHARE * 1000

    def caption(self) -> str:
        return (
            f"a person with {self.skin} skin, {self.hair_style} {self.hair} hair wearing a {self.shirt} shirt "
            f"with a {self.logo_colour} {self.logo} logo"
        )


@dataclass(frozen=True)
class Scene:
    """One shot: who is in it, seen from where, in which mood, in front of what."""

    characters: tuple[Character, ...]
    expressions: tuple[str, ...] = ("neutral",)
    viewpoint: Viewpoint = "front"
    background: str = "sky"
    moving_background: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.characters) <= len(PLACEMENTS):
            raise ValueError(f"Scene: characters must be one, two or three people, got {len(self.characters)}")
        if len(self.expressions) != len(self.characters):
            raise ValueError(
                f"Scene: expressions must have one entry per character ({len(self.characters)}), "
                f"got {len(self.expressions)}"
            )
        for name in self.expressions:
            if name not in EXPRESSIONS:
                raise ValueError(f"Scene: expression must be one of {', '.join(EXPRESSIONS)}, got {name!r}")
        if self.viewpoint not in VIEWPOINTS:
            raise ValueError(f"Scene: viewpoint must be one of {', '.join(VIEWPOINTS)}, got {self.viewpoint!r}")

    @staticmethod
    def random(
        rng: np.random.Generator,
        split: Literal["train", "held_out", "any"] = "any",
        people: int = 1,
        viewpoint: Viewpoint = "front",
    ) -> Scene:
        return Scene(
            characters=tuple(Character.random(rng, split) for _ in range(people)),
            expressions=tuple(str(rng.choice(EXPRESSIONS)) for _ in range(people)),
            viewpoint=viewpoint,
            background=str(rng.choice(list(BACKGROUND))),
            moving_background=bool(rng.random() < 0.3),
        )

    def caption(self) -> str:
        """The scene in the closed vocabulary of the small text encoder."""
        people = " and ".join(
            f"{c.caption()}, {mood}" for c, mood in zip(self.characters, self.expressions, strict=True)
        )
        backdrop = "moving background" if self.moving_background else "still background"
        return f"{people}, {self.viewpoint} view, talking, {backdrop}"

    def with_viewpoint(self, viewpoint: Viewpoint) -> Scene:
        return replace(self, viewpoint=viewpoint)

    def placements(self) -> list[tuple[float, float, float]]:
        """(x, y, scale) of each person, left to right: scale 1 fills the frame."""
        return list(PLACEMENTS[len(self.characters)])


@dataclass
class Motion:
    """How one person moves besides talking: head offset (frame sizes), eyelids (1 open), backdrop phase, all [F]."""

    dx: FloatArray
    dy: FloatArray
    eyelids: FloatArray
    phase: FloatArray = field(default_factory=lambda: np.zeros(0, np.float32))

    @staticmethod
    def random(rng: np.random.Generator, frames: int, fps: int = 16, sway: float = 0.02) -> Motion:
        """Slow smooth sway (two sines of 2-6 s period an axis) and blinks of 3 frames every 2-5 s."""
        t = np.arange(frames, dtype=np.float32) / fps

        def smooth(amplitude: float) -> FloatArray:
            wave = np.zeros(frames, np.float32)
            for share in (0.65, 0.35):
                period, phase = rng.uniform(2.0, 6.0), rng.uniform(0, 2 * np.pi)
                wave += share * np.sin(2 * np.pi * t / period + phase).astype(np.float32)
            return amplitude * wave

        eyelids = np.ones(frames, np.float32)
        at = rng.uniform(0.5, 4.0) * fps
        while at < frames:
            for step, openness in enumerate((0.4, 0.0, 0.4)):
                if int(at) + step < frames:
                    eyelids[int(at) + step] = openness
            at += rng.uniform(2.0, 5.0) * fps
        return Motion(
            dx=smooth(sway), dy=smooth(0.5 * sway), eyelids=eyelids, phase=(t / 6.0 + rng.random()).astype(np.float32)
        )

    @staticmethod
    def still(frames: int) -> Motion:
        zero = np.zeros(frames, np.float32)
        return Motion(dx=zero, dy=zero, eyelids=np.ones(frames, np.float32), phase=zero)
