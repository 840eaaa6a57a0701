# SPDX-License-Identifier: Apache-2.0
"""Which part of a video may change: the lower half of a face, found or given, from frame to frame.

SkyReels-Audio (section 2.3) cuts out lower-face boxes, from the face's landmarks. Found boxes are followed through the
video: the face that is nearest to where it was, looked for a few times a second, with straight lines between, and where
it is turned away, from where it was last to where it is next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from talkingdit.errors import UserError
from talkingdit.media.boxes import Box, read_box
from talkingdit.media.framing import Frames

if TYPE_CHECKING:
    from talkingdit.media.edited import EditedVideo

Mask = NDArray[np.bool_]

LOOKS = 8  # times a second that a face is looked for
WIDER = 0.08  # of a face's width and height, that its lower half is taken larger


class Region(Protocol):
    """The part of a video that may change."""

    def masks(self, first: int, count: int) -> Mask:
        """Of some frames, bool [count, H, W]: true where they may."""

    @property
    def bounds(self) -> Box:
        """A box around all of it, over the whole video."""

    @property
    def name(self) -> str:
        """What finished clips depend on: equal for equal regions."""


@dataclass(frozen=True)
class Boxes:
    """A box per frame.

    Args:
        boxes: float [F, 4], x0, y0, x1, y1 in pixels; one for all frames if F is 1.
        size: height and width of the frames.
    """

    boxes: NDArray[np.float64]
    size: tuple[int, int]

    def masks(self, first: int, count: int) -> Mask:
        found = np.zeros((count, *self.size), bool)
        for i in range(count):
            x0, y0, x1, y1 = self.boxes[min(first + i, len(self.boxes) - 1)]
            found[i, max(0, int(y0)) : int(np.ceil(y1)), max(0, int(x0)) : int(np.ceil(x1))] = True
        return found

    @property
    def bounds(self) -> Box:
        low, high = self.boxes[:, :2].min(0), self.boxes[:, 2:].max(0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    @property
    def name(self) -> str:
        return _named("boxes", np.round(self.boxes, 3))


@dataclass(frozen=True)
class Painted:
    """A picture that is white where a video may change, for all of its frames."""

    mask: Mask  # [H, W]

    def masks(self, first: int, count: int) -> Mask:
        return np.broadcast_to(self.mask, (count, *self.mask.shape))

    @property
    def bounds(self) -> Box:
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)

    @property
    def name(self) -> str:
        return _named("painted", self.mask)


def _named(kind: str, values: NDArray[Any]) -> str:
    found = hashlib.sha256(f"{values.shape}".encode() + np.ascontiguousarray(values).tobytes())
    return f"{kind} {found.hexdigest()[:32]}"


def given_region(mask: str, video: EditedVideo) -> Region:
    """The region that a user gives: a box "x0,y0,x1,y1" in pixels, or a picture, white where the video may change.

    Raises:
        UserError: the box is empty or lies outside, the picture cannot be read, is black or of another shape.
    """
    height, width = video.size
    box = read_box(mask)
    if box is not None:
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(
                f"--mask: expected a box x0,y0,x1,y1 inside of the {width} x {height} pixels of {video.path}, "
                f"got {mask}."
            )
        return Boxes(np.array([box]), video.size)
    import cv2

    from talkingdit.media.image import read_image

    picture = read_image(Path(mask))
    if picture.shape[0] * width != picture.shape[1] * height:
        raise UserError(
            f"--mask {mask}: expected a picture of the shape of {video.path}, {width} x {height}, got "
            f"{picture.shape[1]} x {picture.shape[0]}."
        )
    shown = cv2.resize(picture.mean(2).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 127
    if not shown.any():
        raise UserError(f"--mask {mask}: expected white where the video may change, got none.")
    return Painted(shown)


def lower_face(face: Any) -> Box:
    """The box of the lower half of a face (`talkingdit.detect.faces.Face`): from its nose to below its chin."""
    x0, y0, x1, y1 = face.box
    across, down = WIDER * (x1 - x0), WIDER * (y1 - y0)
    nose = face.landmarks[2][1] if len(face.landmarks) >= 3 else (y0 + y1) / 2
    return x0 - across, min(nose, y1 - down), x1 + across, y1 + down


def found_region(video: EditedVideo, detect: Callable[[Frames], Sequence[Any]]) -> Region:
    """The lower half of the face of the person in a video, followed from frame to frame.

    Args:
        detect: the faces of a picture, best first. The largest in the first picture that shows one is followed.

    Raises:
        UserError: no picture shows a face.
    """
    step = max(1, round(video.rate / LOOKS))
    looked = [*range(0, video.frames, step)]
    if looked[-1] != video.frames - 1:
        looked.append(video.frames - 1)
    seen = dict(_follow(_pictures(video, looked), detect))
    if not seen:
        raise UserError(
            f"{video.path}: no face was found in it; say by --mask where it may change, a box x0,y0,x1,y1 or a picture."
        )
    at = np.array(list(seen))
    boxes = np.array([seen[number] for number in at])
    every = np.arange(video.frames)
    lines = np.stack([np.interp(every, at, boxes[:, side]) for side in range(4)], axis=1)
    height, width = video.size
    return Boxes(np.clip(lines, 0, [width, height, width, height]), video.size)


def _pictures(video: EditedVideo, numbers: Sequence[int]) -> Iterable[tuple[int, Frames]]:
    wanted = set(numbers)
    for number, picture in enumerate(video.read()):
        if number in wanted:
            yield number, picture


def _follow(
    pictures: Iterable[tuple[int, Frames]], detect: Callable[[Frames], Sequence[Any]]
) -> Iterable[tuple[int, Box]]:
    """The lower face in every picture that shows the one face that is followed."""
    before: Box | None = None
    for number, picture in pictures:
        faces = detect(picture)
        if not faces:
            continue
        if before is None:
            face = max(faces, key=lambda f: (f.box[2] - f.box[0]) * (f.box[3] - f.box[1]))
        else:
            face = max(faces, key=lambda f: _shared(f.box, before))
            if not _shared(face.box, before):
                continue
        before = face.box
        yield number, lower_face(face)


def _shared(a: Box, b: Box | None) -> float:
    """Area that two boxes have in common."""
    if b is None:
        return 0.0
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, across) * max(0.0, down)


def cell_masks(masks: Mask) -> NDArray[np.float32]:
    """Masks of frames as the autoencoder shrinks them: max-pooled, so that a cell changes if any pixel of it may.

    Args:
        masks: bool [1 + 4 n, H, W], sides multiples of 8; the first frame has a latent of its own.

    Returns:
        float32 [1 + n, H / 8, W / 8] of zeros and ones.
    """
    count, height, width = masks.shape
    if count % 4 != 1 or height % 8 or width % 8:
        raise ValueError(f"cell_masks: masks must be [1 + 4 n, 8 h, 8 w], got {list(masks.shape)}")
    cells = masks.reshape(count, height // 8, 8, width // 8, 8).max(axis=(2, 4))
    rest = cells[1:].reshape(-1, 4, *cells.shape[1:]).max(axis=1)
    return np.concatenate([cells[:1], rest]).astype(np.float32)
