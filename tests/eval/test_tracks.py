# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np

from talkingdit.eval.tracks import Track, crops, link, match


def moving(frames: int, start: float, gone: tuple[int, ...] = ()) -> list[list[tuple[tuple[float, ...], float]]]:
    boxes = [(start + f, 10.0, start + f + 20, 30.0) for f in range(frames)]
    return [[] if f in gone else [(box, 0.9)] for f, box in enumerate(boxes)]


def test_two_people_keep_their_tracks_where_detections_change_order() -> None:
    left, right = moving(20, 0), moving(20, 60)
    mixed = [a + b if f % 2 else b + a for f, (a, b) in enumerate(zip(left, right, strict=True))]
    tracks = link(mixed)
    assert len(tracks) == 2
    assert sorted(float(track.boxes[0, 0]) for track in tracks) == [0.0, 60.0]
    for track in tracks:
        np.testing.assert_array_equal(np.diff(track.boxes[:, 0]), 1)


def test_missing_frames_are_marked_and_bridged() -> None:
    (track,) = link(moving(20, 0, gone=(5, 6, 7)))
    assert np.nonzero(~track.found)[0].tolist() == [5, 6, 7]


def test_what_is_there_for_a_moment_is_no_track() -> None:
    detections = moving(20, 0)
    detections[3] = [*detections[3], ((80.0, 60.0, 90.0, 70.0), 0.6)]
    assert len(link(detections)) == 1


def test_people_are_matched_by_place_over_frames_of_another_size() -> None:
    one = [link(moving(10, start))[0] for start in (0, 60)]
    twice = [Track(track.boxes * 2, track.scores, track.items) for track in one[::-1]]
    assert match(one, (100, 100), twice, (200, 200)) == [1, 0]
    assert match(one, (100, 100), twice[:1], (200, 200)) == [-1, 0]


def test_crops_show_the_box_and_leave_lost_frames_black() -> None:
    frames = np.zeros((6, 60, 80, 3), np.uint8)
    frames[:, 20:40, 30:50] = 255
    boxes = np.tile([30.0, 20.0, 50.0, 40.0], (6, 1))
    boxes[2] = np.nan
    track = Track(boxes, np.ones(6), np.arange(6))
    for side in (40, 64, 16):  # as they are, enlarged, reduced
        cut = crops(frames, track, side, margin=2.0)
        assert not cut[2].any()
        inner = cut[0][side // 4 + 2 : -side // 4 - 2, side // 4 + 2 : -side // 4 - 2]
        assert inner.min() > 240
        np.testing.assert_allclose(cut[0].mean() / 255, 0.25, atol=0.03)
