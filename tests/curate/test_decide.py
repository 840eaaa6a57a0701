# SPDX-License-Identifier: Apache-2.0
"""Decisions follow from noted figures alone; what is written is what training reads."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from talkingdit.curate.anchors import viewpoint
from talkingdit.curate.decide import decide
from talkingdit.curate.duplicates import groups
from talkingdit.curate.measure import Video
from talkingdit.curate.report import write_report
from talkingdit.curate.settings import CurateSettings, Limit, Write
from talkingdit.curate.write import kind_of, wider, write_manifest, write_table
from talkingdit.data.manifest import read_manifest

LIMITS = {"clip.seconds": Limit(at_least=2), "faces.share": Limit(at_least=0.9, required=True)}


def record(key: str, *clips: dict[str, Any]) -> dict[str, Any]:
    found, at = [], 0.0
    for number, figures in enumerate(clips):
        end = at + figures.get("clip.seconds", 3.0)
        anchors = figures.pop("anchors", [])
        found.append({"number": number, "start": at, "end": end, "figures": figures, "anchors": anchors})
        at = end
    return {"key": key, "path": f"/videos/{key}.mp4", "clips": found, "error": "", "lacking": {}}


def signature(seed: int, noise: float = 0.0) -> str:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(30, 220, (5, 12, 12, 3)).astype(np.float64)
    pictures += np.random.default_rng(1).normal(0, noise, pictures.shape) if noise else 0
    return base64.b64encode(pictures.clip(0, 255).astype(np.uint8).tobytes()).decode()


def test_the_first_limit_that_is_not_kept_removes_a_clip() -> None:
    records = [
        record("a", {"clip.seconds": 3.0, "faces.share": 1.0}, {"clip.seconds": 1.0, "faces.share": 0.1}),
        record("b", {"clip.seconds": 3.0}, {"clip.seconds": 3.0, "faces.share": 0.5}),
    ]
    decisions = decide(records, CurateSettings(limits=dict(LIMITS)))
    assert [clip.removed_by for clip in decisions.clips] == ["", "clip.seconds", "faces.share", "faces.share"]
    assert decisions.clips[1].failed == ["clip.seconds", "faces.share"]
    rows = [(s.name, s.came, s.removed, s.alone, s.unknown) for s in decisions.funnel]
    assert rows == [("clip.seconds", 4, 1, 1, 0), ("faces.share", 3, 2, 3, 1)]
    again = decide(records, CurateSettings(limits=LIMITS | {"faces.share": Limit(at_least=0.4)}))
    assert [clip.key for clip in again.kept] == ["a/0000", "b/0000", "b/0001"]


def test_of_copies_the_largest_is_kept() -> None:
    limits = {"duplicates.of_another": Limit(at_most=0)}
    rows = [
        {"clip.seconds": 3.0, "clip.height": 240, "signature.pictures": signature(0, noise=3)},
        {"clip.seconds": 3.0, "clip.height": 720, "signature.pictures": signature(0)},
        {"clip.seconds": 3.0, "clip.height": 720, "signature.pictures": signature(5)},
        {"clip.seconds": 9.0, "clip.height": 720, "signature.pictures": signature(0)},
    ]
    decisions = decide([record("v", *rows)], CurateSettings(limits=limits))
    assert [clip.kept for clip in decisions.clips] == [False, True, True, True]  # the last is much longer
    assert decisions.clips[0].copy_of == "v/0001"


def test_a_copy_is_found_among_many() -> None:
    """Codes find a copy as surely as comparing each with each."""
    signatures = [signature(seed) for seed in range(300)] + [signature(seed, noise=3) for seed in range(0, 300, 10)]
    first = groups(signatures, [3.0] * len(signatures))
    assert first[:300] == list(range(300))
    assert first[300:] == list(range(0, 300, 10))


def test_the_manifest_is_one_that_training_reads(tmp_path: Path) -> None:
    front = [{"kind": "front", "at": 1.0, "file": "anchors/v/0000-front.png"}]
    left = [{"kind": "left", "at": 4.0, "file": "anchors/v/0001-left.png"}]
    box = {"faces.box": [0.2, 0.2, 0.6, 0.7], "faces.mouth": [0.3, 0.5, 0.5, 0.6]}
    rows = ({"anchors": front, **box}, {"anchors": left, "caption.text": "a person talks"}, {"clip.seconds": 1.0})
    records = [record("v", *rows)]
    decisions = decide(records, CurateSettings(limits={"clip.seconds": Limit(at_least=2)}))
    videos = [Video("v", Path("/videos/v.mp4"), caption="given")]
    assert write_manifest(tmp_path, decisions, videos, Write()) == 2
    first, second = read_manifest(tmp_path / "manifest.jsonl").entries
    assert (first.key, first.start, first.end, first.caption) == ("v/0000", 0.0, 3.0, "given")
    assert first.video.resolve() == Path("/videos/v.mp4")
    assert first.regions["face"] == pytest.approx((0.1, 0.075, 0.7, 0.825), abs=1e-4)
    assert first.regions["lips"] == pytest.approx((0.25, 0.475, 0.55, 0.625), abs=1e-4)
    assert set(first.regions) == {"face", "lower_face", "lips"}
    assert second.caption == "a person talks"
    # Each has the other's anchor: superset anchoring, from inside and outside of the clip.
    for entry in (first, second):
        assert entry.outside["front"] == (tmp_path / "anchors/v/0000-front.png",)
        assert entry.outside["left"] == (tmp_path / "anchors/v/0001-left.png",)
        times = [time for time in entry.outside["global"] if isinstance(time, float)]
        assert any(entry.start <= time < entry.end for time in times)
        assert any(not entry.start <= time < entry.end for time in times)
        assert entry.kind == "viewpoints"


def test_the_same_figures_make_the_same_files(tmp_path: Path) -> None:
    records = [record("v", *[{"faces.box": [0.1, 0.1, 0.5, 0.5], "clip.seconds": 3.0} for _ in range(5)])]
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, decide(records, CurateSettings(limits={})), [], Write())
        made.append((tmp_path / name / "manifest.jsonl").read_bytes())
    assert made[0] == made[1]


def test_the_table_has_every_clip_and_its_decision(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    records = [record("v", {"clip.seconds": 3, "faces.box": [0.1, 0.1, 0.5, 0.5]}, {"clip.seconds": 1.5})]
    file = write_table(tmp_path, decide(records, CurateSettings(limits={"clip.seconds": Limit(at_least=2)})))
    rows = parquet.read_table(file).to_pylist()
    assert [(r["clip"], r["kept"], r["removed_by"]) for r in rows] == [
        ("v/0000", True, ""),
        ("v/0001", False, "clip.seconds"),
    ]
    assert rows[0]["clip.seconds"] == 3.0
    assert json.loads(rows[0]["faces.box"]) == [0.1, 0.1, 0.5, 0.5]


def test_the_report_stands_alone_and_escapes_what_files_say(tmp_path: Path) -> None:
    records = [record("v", *[{"clip.seconds": float(n)} for n in range(1, 6)])]
    decisions = decide(records, CurateSettings(limits={"clip.seconds": Limit(at_least=2.5)}))
    write_report(tmp_path, decisions, 1, [{"error": "<script>alert(1)</script>"}], {"caption": "give <a> model"})
    page = (tmp_path / "report.html").read_text()
    assert "3 of 5 clips are kept" in page
    assert "at least 2.5" in page
    assert "<script" not in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("body", "head", "seen"),
    [
        (10.0, 5.0, "front"),
        (-90.0, None, "left"),
        (85.0, None, "right"),
        (175.0, None, "back"),
        (-200.0, None, "back"),
        (400.0, None, None),
        (40.0, None, None),
        (175.0, 3.0, "front"),  # a face is to be seen: the pose is wrong
        (None, -50.0, "left"),
        (None, 50.0, "right"),
        (None, 25.0, None),
        (None, None, None),
    ],
)
def test_viewpoints(body: float | None, head: float | None, seen: str | None) -> None:
    assert viewpoint(body, head) == seen


def test_kinds_of_training_data_follow_from_anchors() -> None:
    assert kind_of({"global": [1], "front": [1], "left": [1]}) == "viewpoints"
    assert kind_of({"happy": [1], "sad": [1]}) == "expressions"
    assert kind_of({"happy": [1], "sad": [1], "front": [1], "back": [1]}) == "both"
    assert kind_of({"global": [1], "front": [1]}) == "video"
    assert wider([0.0, 0.5, 0.5, 1.0], 0.5) == [0.0, 0.25, 0.75, 1.0]


def test_parts_of_one_shot_are_no_copies_of_each_other(tmp_path: Path) -> None:
    """Somebody before a camera that stands still: an hour of it is not one clip and its copies."""
    import cv2

    from talkingdit.curate.look import looks
    from talkingdit.curate.settings import Watch
    from talkingdit.curate.stages import ClipFindings
    from talkingdit.curate.stages.signature import SignatureStage
    from talkingdit.eval.calibration import FPS, scripts
    from talkingdit.media.files import VideoWriter
    from talkingdit.media.sound import SPEECH_RATE

    (script,) = scripts(1, 300, 128)
    frames, watch = script.draw(), Watch(clip_seconds=4.0)
    smaller = np.stack([cv2.resize(frame, (80, 80), interpolation=cv2.INTER_AREA) for frame in frames])
    found = []
    for name, pictures, sound in (
        ("whole", frames, script.sound),
        ("copy", smaller, script.sound),
        ("mute", smaller, None),
    ):
        with VideoWriter(tmp_path / f"{name}.mp4", FPS, pictures.shape[1:3], sound, SPEECH_RATE) as video:
            video.write(pictures)
        clips = list(looks(tmp_path / f"{name}.mp4", watch, find_cuts=False))
        found += [(clip.seconds, SignatureStage(watch).measure(clip, ClipFindings())) for clip in clips]
    names = ("pictures", "loudness", "movement")
    moments, loudness, movement = ([told[f"signature.{name}"] for _, told in found] for name in names)
    count = len(found) // 3
    assert count >= 3
    first = groups(moments, [seconds for seconds, _ in found], loudness, movement)
    assert first == [*range(count)] * 3
    assert len(set(groups(moments, [seconds for seconds, _ in found]))) < count  # pictures alone take them for one


def test_folders_are_no_videos(tmp_path: Path) -> None:
    from talkingdit.curate.job import find_videos

    (tmp_path / "takes.mp4").mkdir()
    (tmp_path / "takes.mp4" / "one.mp4").touch()
    assert [video.path.name for video in find_videos(tmp_path)] == ["one.mp4"]
