# SPDX-License-Identifier: Apache-2.0
"""Content anchors (Gloria, section 4.1): frames that say who the character is, and where they stand in time.

Three types: one global frame of the scene at the size of the video; up to four views of the body; up to eight
expressions of the face. Each is patchified like the video and joins its self-attention. "RoPE as weak condition"
(equation 1) tells them apart by their place in time alone,

    t(type, kind) = t_video + base(type) + step * index(kind),

which the height and width axes do not know: every anchor's own grid begins at 0. t_video is the beginning of the chunk.
Our copy of the paper has lost the numbers. Ours, the defaults of a model's configuration, are chosen so that

    - anchors stand behind all latents of a chunk (21 of them at 0 .. 20), as Wan-S2V's reference at 30 does, which the
      same backbone has learned to read;
    - types are ten apart, more than the kinds of a type, so that no two anchors share a place;
    - all stay within the range of times that the backbone's video training has seen at other rates (below 64).

They are settings (`anchor_offsets`, `anchor_step`), and `python -m bench.ablations` has the row in which all are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from talkingdit.errors import UserError

GLOBAL, VIEW, EXPRESSION = "global", "view", "expression"
KINDS: dict[str, tuple[str, ...]] = {
    GLOBAL: ("global",),
    VIEW: ("front", "back", "left", "right"),
    EXPRESSION: ("surprise", "angry", "disgust", "fear", "contempt", "neutral", "happy", "sad"),
}
ALIASES = {"viewpoint": VIEW}  # of types, as the paper says it
OFFSETS: dict[str, float] = {GLOBAL: 30.0, VIEW: 40.0, EXPRESSION: 50.0}
STEP = 1.0


def anchor_time(offsets: Mapping[str, float], step: float, type: str, kind: str) -> float:
    """Place of an anchor in time, in latent frames from the beginning of the chunk.

    Raises:
        ValueError: there is no such type or kind.
    """
    type = ALIASES.get(type, type)
    if type not in KINDS:
        raise ValueError(f"anchor: type must be one of {', '.join(KINDS)}, got {type!r}")
    if kind not in KINDS[type]:
        raise ValueError(f"anchor: kind of {type} must be one of {', '.join(KINDS[type])}, got {kind!r}")
    return offsets[type] + step * KINDS[type].index(kind)


@dataclass(frozen=True, order=True)
class AnchorFile:
    """An anchor that was asked for."""

    type: str
    kind: str
    path: Path

    @property
    def name(self) -> str:
        """As it is said on the command line."""
        return self.type if self.type == GLOBAL else f"{self.type}/{self.kind}"


def read_anchor(text: str) -> AnchorFile:
    """An anchor from "global=a.png", "view/back=b.png" or "expression/happy=c.png".

    Raises:
        ValueError: something else.
    """
    said, equals, path = text.partition("=")
    type, _, kind = said.partition("/")
    type = ALIASES.get(type, type)
    if not equals or not path or type not in KINDS or (type == GLOBAL) == bool(kind):
        wanted = "global=FILE, view/KIND=FILE or expression/KIND=FILE"
        raise ValueError(f"must be {wanted}, got {text!r}")
    kind = kind or KINDS[GLOBAL][0]
    if kind not in KINDS[type]:
        raise ValueError(f"kind of {type} must be one of {', '.join(KINDS[type])}, got {kind!r}")
    return AnchorFile(type, kind, Path(path).expanduser())


def check_once(anchors: tuple[AnchorFile, ...]) -> None:
    """Is each anchor given once? There are then at most one global, four views and eight expressions.

    Raises:
        UserError: one is given twice.
    """
    seen: dict[str, Path] = {}
    for anchor in anchors:
        if anchor.name in seen:
            raise UserError(f"anchor {anchor.name}: given twice, as {seen[anchor.name]} and {anchor.path}; take one.")
        seen[anchor.name] = anchor.path
