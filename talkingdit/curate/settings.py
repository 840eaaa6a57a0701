# SPDX-License-Identifier: Apache-2.0
"""What one TOML file says: how videos are watched, which limits figures must keep, and what is written.

[watch]                     # another value here measures the videos anew
fps = 25.0
[limits]                    # another value here only decides anew
"faces.share" = { at_least = 0.9 }
"speech.share" = { off = true }
[write]
anchors = true
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from talkingdit.errors import UserError


@dataclass(frozen=True)
class Watch:
    """How a video is watched.

    Args:
        fps: pictures a second that are looked at; of a faster video every n-th.
        side: of pictures in which faces and motion are looked for, the longer one, in pixels.
        still_side: of the few pictures in which sharpness, text and quality are looked at.
        still_every: seconds between these.
        face_every: seconds between pictures in which faces are searched; in between they are followed.
        clip_seconds: longest clip; longer shots are cut.
        min_seconds: shortest clip that is measured at all.
        cut: probability from which on there is a cut; 0 looks for none.
        same_voice: cosine of two parts of the speech from which on one person says both, for `voices.count`; the
            limit on `voices.likeness` asks the same without watching anew.
        largest_lag: seconds by which sound and mouth are shifted against each other at most.
        stages: that measure, in this order; a name of `stages`, or "module:Class" of your own.
        models: folders, files or "module:name" of models that no package carries, by stage.
        card_pictures: of a clip, that stages on a card of their own are given on Ray; 0: all.
        samples: share of the clips whose pictures are kept for the report.
    """

    fps: float = 25.0
    side: int = 448
    still_side: int = 1280
    still_every: float = 1.5
    face_every: float = 0.24
    clip_seconds: float = 20.0
    min_seconds: float = 1.0
    cut: float = 0.4
    same_voice: float = 0.68
    largest_lag: float = 0.6
    stages: tuple[str, ...] = (
        *("picture", "people", "body", "sharpness", "motion", "text"),
        *("speech", "voices", "sync", "syncnet", "light_asd", "language", "caption", "signature"),
    )
    models: dict[str, str] = field(default_factory=dict)
    card_pictures: int = 8
    samples: float = 1.0


@dataclass(frozen=True)
class Limit:
    """What a figure must keep.

    Args:
        at_least, at_most: bounds; one of them or both.
        off: the limit does not count, and removes nothing.
        required: what has no such figure is removed, too.
    """

    at_least: float | None = None
    at_most: float | None = None
    off: bool = False
    required: bool = False

    def keeps(self, value: float | None) -> bool:
        """Does a figure keep the limit?"""
        if self.off:
            return True
        if value is None or math.isnan(value):
            return not self.required
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        bounds = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(bounds) + (" (off)" if self.off else "")


# In the order of the funnel: what removes a clip is the first limit that it does not keep.
LIMITS: dict[str, Limit] = {
    "clip.seconds": Limit(at_least=2.0, required=True),
    "clip.height": Limit(at_least=128),
    "sharpness.picture": Limit(at_least=7.0),
    "faces.people": Limit(at_least=1, at_most=1, required=True),
    "faces.share": Limit(at_least=0.85, required=True),
    "faces.height": Limit(at_least=0.08),
    "body.head_share": Limit(at_least=0.06, at_most=1.0),
    "sharpness.face": Limit(at_least=25.0),
    "sharpness.hands": Limit(at_least=15.0),
    "motion.mean": Limit(at_least=0.0005, at_most=0.5),
    "picture.clipped": Limit(at_most=0.35),
    "picture.contrast": Limit(at_least=0.04),
    "text.over_person": Limit(at_most=0.02),
    "text.share": Limit(at_most=0.15),
    "speech.share": Limit(at_least=0.3, required=True),
    "voices.likeness": Limit(at_least=0.68),
    "sync.score": Limit(at_least=0.3),
    "sync.lag": Limit(at_least=-0.14, at_most=0.14),
    "syncnet.confidence": Limit(at_least=3.0),  # of LatentSync's data (arXiv:2412.09262)
    "syncnet.offset": Limit(at_least=-3, at_most=3),  # pictures of 25 a second
    "active_speaker.score": Limit(at_least=0.0),  # less: nobody who is to be seen speaks
    "active_speaker.is_largest": Limit(at_least=1),  # else the wrong person speaks
    "language.is_wanted": Limit(at_least=1),
    "duplicates.of_another": Limit(at_most=0),
}


@dataclass(frozen=True)
class Write:
    """What is written of the clips that are kept.

    Args:
        anchors: pictures of viewpoints and expressions, and times for global ones.
        anchors_of_a_kind: most of each for a clip.
        wanted_languages: of `language.name`; none: any.
        margin: around the box of a face in `regions.face`, in its sizes.
        head_margin: around a head that is cut out as an anchor.
    """

    anchors: bool = True
    anchors_of_a_kind: int = 4
    wanted_languages: tuple[str, ...] = ()
    margin: float = 0.25
    head_margin: float = 0.5


USUAL = Write()


@dataclass(frozen=True)
class CurateSettings:
    """All of it."""

    watch: Watch = Watch()
    limits: dict[str, Limit] = field(default_factory=lambda: dict(LIMITS))
    write: Write = Write()


def read_settings(path: Path | None) -> CurateSettings:
    """The settings of a TOML file; without one, the usual ones.

    Raises:
        UserError: no such file, not TOML, or it says what nobody knows.
    """
    if path is None:
        return CurateSettings()
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"settings {str(path)!r}: expected a TOML file, got {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not TOML ({error}).") from None
    unknown = set(found) - {"watch", "limits", "write"}
    if unknown:
        raise UserError(f"{path}: expected the tables watch, limits and write, got {sorted(unknown)[0]!r}.")
    watch = _made(Watch, found.get("watch", {}), f"{path}: watch")
    _check_watch(watch, path)
    return CurateSettings(
        watch, _limits(found.get("limits", {}), path), _made(Write, found.get("write", {}), f"{path}: write")
    )


def _check_watch(watch: Watch, path: Path) -> None:
    for name in ("fps", "side", "still_side", "still_every", "face_every", "clip_seconds"):
        if not getattr(watch, name) > 0:
            raise UserError(f"{path}: watch.{name}: expected a number above 0, got {getattr(watch, name)}.")
    for name in ("cut", "same_voice", "samples"):
        if getattr(watch, name) > 1:
            raise UserError(f"{path}: watch.{name}: expected 0 to 1, got {getattr(watch, name)}.")


def _limits(found: Any, path: Path) -> dict[str, Limit]:
    if not isinstance(found, dict):
        raise UserError(f"{path}: limits must be a table of figures, got {found!r}.")
    limits = dict(LIMITS)
    for name, value in _flat(found):
        limit = limits[name] = _made(Limit, value, f"{path}: limits.{name}")
        if limit.at_least is not None and limit.at_most is not None and limit.at_least > limit.at_most:
            raise UserError(f"{path}: limits.{name}: expected at_least up to at_most, got {limit}.")
    return limits


def _flat(found: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Figures by their full names; `[limits.faces]` and `"faces.share"` are both understood."""
    known = {f.name for f in dataclasses.fields(Limit)}
    rows: list[tuple[str, Any]] = []
    for name, value in found.items():
        inner = isinstance(value, dict) and value and not set(value) & known and any(
            isinstance(one, dict) for one in value.values()
        )  # fmt: skip
        rows += _flat(value, f"{before}{name}.") if inner else [(before + name, value)]
    return rows


def _made(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from a table, with every value of the type of its field."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a table, got {values!r}.")
    hints = get_type_hints(kind)
    made = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where}: expected one of {', '.join(hints)}, got {name!r}.")
        made[name] = _value(value, hints[name], f"{where}.{name}")
    return kind(**made)


def _value(value: Any, hint: Any, where: str) -> Any:
    text = str(hint)
    if hint is bool or hint is str:
        good = isinstance(value, hint)
    elif hint is int:
        good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 16
    elif text.startswith("tuple"):
        good = isinstance(value, list) and all(isinstance(one, str) for one in value)
        value = tuple(value) if good else value
    elif text.startswith("dict"):
        good = isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
    else:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        good = good and (hint is not float or value >= 0)
        value = float(value) if good else value
    if not good:
        wanted = "a list of texts" if text.startswith("tuple") else getattr(hint, "__name__", "a number")
        raise UserError(f"{where}: expected {wanted}, got {value!r}.")
    return value
