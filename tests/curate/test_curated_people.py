# SPDX-License-Identifier: Apache-2.0
"""Real people: what curation says of clips that everybody can look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from needs import need_cuts, need_faces, need_stages
from real_media import ACTRESS, ASTRONAUT, CUT, GROUP, PRESENTER, real

from talkingdit.curate.look import looks
from talkingdit.curate.measure import Video, Watcher
from talkingdit.curate.settings import Watch, Write
from talkingdit.curate.stages.sync import envelope, shift
from talkingdit.detect.blaze import large_faces
from talkingdit.detect.faces import faces
from talkingdit.media.files import read_image
from talkingdit.media.reader import all_pictures

pytestmark = pytest.mark.slow


def figures(folder: Path, path: Path, *stages: str, cut: float = 0.0, fps: float = 25.0) -> list[dict[str, object]]:
    need_stages(*stages)
    watcher = Watcher(Watch(stages=stages, cut=cut, fps=fps, samples=0), folder, write=Write(anchors=False))
    record = watcher.record(Video("clip", path))
    assert not record["error"]
    return [{**clip["figures"], "start": clip["start"]} for clip in record["clips"]]


@pytest.mark.parametrize("clip", [PRESENTER, ACTRESS])
def test_a_face_is_found_in_nearly_every_picture(clip: tuple[str, str]) -> None:
    need_stages("people")
    found = [bool(large_faces(picture)) for picture in all_pictures(real(*clip))]
    assert len(found) > 300
    assert np.mean(found) >= 0.98


def test_a_group_of_five_is_counted_and_a_portrait_is_one() -> None:
    need_faces()
    assert len(faces(np.asarray(read_image(real(*GROUP))), 0.6, 640)) == 5
    portrait = np.asarray(read_image(real(*ASTRONAUT)))
    assert len(faces(portrait, 0.6, 640)) == len(large_faces(portrait)) == 1


def test_the_cut_is_found_and_what_is_behind_it_has_no_face(tmp_path: Path) -> None:
    need_cuts()
    face, cartoon = figures(tmp_path, real(*CUT), "picture", "people", cut=0.5, fps=12.5)
    assert cartoon["start"] == pytest.approx(2.42, abs=0.1)
    assert (face["faces.people"], cartoon["faces.people"]) == (1, 0)


def test_the_silent_clip_is_called_silent(tmp_path: Path) -> None:
    (clip,) = figures(tmp_path, real(*ACTRESS), "speech", fps=2)
    assert (clip["speech.silent"], clip["speech.share"]) == (1, 0.0)


def test_a_shifted_sound_is_recognised_by_its_shift() -> None:
    """The clip itself is 3 pictures off, as SyncNet's authors measure in it; what we shift adds to that."""
    need_stages("people", "speech", "voices")
    from talkingdit.curate.stages import ClipFindings, make_stages

    watch = Watch(stages=("people", "speech", "voices"))
    stages, _ = make_stages(watch)
    (look,) = looks(real(*PRESENTER), watch, find_cuts=False)
    found = ClipFindings()
    said = {name: value for stage in stages.values() for name, value in stage.measure(look, found).items()}
    assert said["faces.people"] == said["voices.count"] == 1
    assert said["speech.share"] > 0.6
    mouth = found.people[0].opening
    assert mouth is not None
    for shifted in (-0.2, 0.0, 0.2):
        samples = np.roll(look.samples, round(shifted * 16000))
        lag, score, _ = shift(mouth.astype(np.float64), envelope(samples, look.fps, len(mouth)), look.fps, 0.6)
        assert lag == pytest.approx(0.12 - shifted, abs=0.041)
        assert score > 0.5
