# SPDX-License-Identifier: Apache-2.0
"""Many videos: broken ones, workers and drivers that die, a full disk. Nothing is lost and nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from clip_files import draw, voice, write_video
from forked import start

from talkingdit.curate.job import CurateJob, curate
from talkingdit.curate.settings import CurateSettings, Limit, Watch, Write
from talkingdit.errors import UserError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find `planted.py`, too."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


def make_videos(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_video(folder / f"{name}.mp4", draw(16), 16, voice(1.0))
    return folder


def job(tmp_path: Path, videos: Path, stage: str = "Quick", **more: Any) -> CurateJob:
    models = {"marks": str(tmp_path), "sleep": str(more.pop("sleep", 0))}
    watch = Watch(stages=(f"planted:{stage}",), models=models, min_seconds=0.5, cut=0)
    settings = CurateSettings(watch, more.pop("limits", {"clip.seconds": Limit(at_least=0.5)}))
    return CurateJob(videos, tmp_path / "out", settings, **more)


def run(what: CurateJob) -> tuple[Any, list[str]]:
    """The outcome, and the keys of the videos that were watched."""
    seen: list[str] = []
    outcome = curate(what, lambda *_: None, lambda record: seen.append(record["key"]))
    return outcome, seen


def noted(tmp_path: Path) -> list[str]:
    return sorted(json.loads(line)["key"] for line in (tmp_path / "out/figures.jsonl").read_text().splitlines())


def names(keys: list[str]) -> list[str]:
    return sorted(key.rsplit("-", 1)[0] for key in keys)


def test_what_is_watched_is_not_watched_again(tmp_path: Path) -> None:
    videos = make_videos(tmp_path / "videos", ["a", "b"])
    (videos / "broken.mp4").write_bytes(b"no video at all")
    outcome, seen = run(job(tmp_path, videos))
    assert names(seen) == ["a", "b", "broken"]
    assert (len(outcome.decisions.kept), outcome.videos, outcome.broken) == (2, 3, 1)
    (row,) = map(json.loads, (tmp_path / "out/broken.jsonl").read_text().splitlines())
    assert "broken.mp4" in row["reason"]
    # Other limits only decide; a new video is watched, a changed one again, a broken one when it is asked for.
    outcome, seen = run(job(tmp_path, videos, limits={"clip.seconds": Limit(at_least=5)}))
    assert (len(outcome.decisions.kept), seen) == (0, [])
    make_videos(videos, ["c"])
    write_video(videos / "a.mp4", draw(24), 16, voice(1.5))
    outcome, seen = run(job(tmp_path, videos))
    assert (names(seen), len(outcome.decisions.kept)) == (["a", "c"], 3)
    assert names(run(job(tmp_path, videos, again=True))[1]) == ["broken"]
    assert not [file.name for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


def test_a_stage_that_falls_over_costs_a_video(tmp_path: Path) -> None:
    outcome, _ = run(job(tmp_path, make_videos(tmp_path / "videos", ["a", "wrong"]), "Deadly"))
    assert (len(outcome.decisions.kept), outcome.broken) == (1, 1)
    assert "RuntimeError: a model fell over" in (tmp_path / "out/broken.jsonl").read_text()


def test_a_worker_that_dies_costs_nothing_and_one_that_always_dies_its_video(tmp_path: Path) -> None:
    videos = make_videos(tmp_path / "videos", ["a", "always", "b", "once"])
    outcome, seen = run(job(tmp_path, videos, "Deadly", workers=2))
    assert names(seen) == ["a", "always", "b", "once"]
    assert names(noted(tmp_path)) == ["a", "always", "b", "once"]
    assert (len(outcome.decisions.kept), outcome.broken) == (3, 1)
    assert "2 workers died while they watched it (signal 9)" in (tmp_path / "out/broken.jsonl").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_the_work_in_a_sentence_and_keeps_what_is_done(tmp_path: Path, workers: int) -> None:
    videos = make_videos(tmp_path / "videos", ["a", "full"])
    with pytest.raises(UserError, match="No space left on device; what is done is kept"):
        run(job(tmp_path, videos, "Deadly", workers=workers))
    (videos / "full.mp4").unlink()
    assert len(run(job(tmp_path, videos, "Deadly"))[0].decisions.kept) == 1


def drive(folder: Path, workers: int) -> None:
    run(job(folder, folder / "videos", sleep=0.05, workers=workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_driver_that_is_killed_loses_and_doubles_nothing(tmp_path: Path, workers: int) -> None:
    wanted = [f"v{n}" for n in range(8)]
    make_videos(tmp_path / "videos", wanted)
    log = tmp_path / "out/figures.jsonl"
    for lines in (1, 3):  # killed when so many videos are noted
        process = start(drive, tmp_path, workers)
        deadline = time.monotonic() + 120
        while (not log.exists() or log.read_bytes().count(b"\n") < lines) and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.join()
    before = noted(tmp_path)
    outcome, seen = run(job(tmp_path, tmp_path / "videos", sleep=0.05))
    assert len(before) >= 3
    assert not set(before) & set(seen)
    assert names(noted(tmp_path)) == wanted
    assert len(outcome.decisions.kept) == len(wanted)


@pytest.mark.slow
def test_ray_does_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="needs ray")
    before = signal.getsignal(signal.SIGTERM)
    videos = make_videos(tmp_path / "videos", ["a", "once", "b"])
    (videos / "broken.mp4").write_bytes(b"no video at all")
    outcome, seen = run(job(tmp_path, videos, "Deadly", ray="local", workers=1))
    assert signal.getsignal(signal.SIGTERM) == before
    assert names(seen) == names(noted(tmp_path)) == ["a", "b", "broken", "once"]
    assert (len(outcome.decisions.kept), outcome.broken) == (3, 1)
    assert run(job(tmp_path, videos, "Deadly", ray="local"))[1] == []
    here = run(job(tmp_path / "here", videos, "Quick"))[0]
    assert [c.figures for c in here.decisions.clips] == [c.figures for c in outcome.decisions.clips]


def test_stages_with_a_card_get_what_others_have_decoded(tmp_path: Path) -> None:
    """As Ray passes it from actor to actor, without Ray."""
    from talkingdit.curate.local import Task
    from talkingdit.curate.on_ray import Actor, CardActor

    make_videos(tmp_path / "videos", ["a"])
    stages = ("planted:Quick", "planted:Card")
    task = Task(Watch(stages=stages, cut=0, min_seconds=0.5, card_pictures=4), tmp_path, write=Write(anchors=False))
    row = {"key": "a", "path": str(tmp_path / "videos/a.mp4"), "start": 0.0, "end": None, "caption": ""}
    first = Actor(task, False)({"video": [json.dumps(row)]})
    figures = json.loads(first["record"][0])["clips"][0]["figures"]
    assert "card.pictures" not in figures
    (record,) = CardActor(task)(first)["record"]
    (clip,) = json.loads(record)["clips"]
    assert (clip["figures"]["card.pictures"], clip["figures"]["card.heard"]) == (4, figures["heard"])
    assert set(clip["took"]) == set(stages)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing there"):
        run(job(tmp_path, tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected videos"):
        run(job(tmp_path, tmp_path / "empty"))
    with pytest.raises(UserError, match="expected a stage of"):
        run(job(tmp_path, make_videos(tmp_path / "videos", ["a"]), "NoSuchStage"))


def test_results_take_the_place_of_earlier_results_alone(tmp_path: Path) -> None:
    videos, out = make_videos(tmp_path / "videos", ["a"]), tmp_path / "out"
    out.mkdir()
    mine = out / "manifest.jsonl"
    mine.write_text(json.dumps({"video": str(videos / "a.mp4")}) + "\n")
    before = mine.read_bytes()
    with pytest.raises(UserError, match=r"a manifest.jsonl of another origin, which would be lost"):
        run(job(tmp_path, videos))
    with pytest.raises(UserError, match=r"manifest.jsonl.*: expected a file of its own, got the one given as videos"):
        run(job(tmp_path, mine))
    assert mine.read_bytes() == before
    assert list(out.iterdir()) == [mine]


def test_a_limit_that_no_stage_knows_is_told(tmp_path: Path) -> None:
    videos = make_videos(tmp_path / "videos", ["a"])
    outcome, _ = run(job(tmp_path, videos, limits={"clip.second": Limit(at_least=0.5)}))
    assert outcome.lacking == {"clip.second": "no stage gives a figure of this name, which a limit is on."}


def test_a_name_that_is_no_text_costs_its_video(tmp_path: Path) -> None:
    """A manifest could not name it; without this the whole of it ended where the report is written."""
    videos = make_videos(tmp_path / "videos", ["a", "b"])
    (videos / "b.mp4").rename(videos / os.fsdecode(b"\xff.mp4"))
    outcome, _ = run(job(tmp_path, videos))
    assert (len(outcome.decisions.kept), outcome.broken) == (1, 1)
    (row,) = map(json.loads, (tmp_path / "out/broken.jsonl").read_text().splitlines())
    assert "no text in UTF-8" in row["reason"]
    assert "no text in UTF-8" in (tmp_path / "out/report.html").read_text()


def test_a_part_behind_the_end_says_which(tmp_path: Path) -> None:
    videos = make_videos(tmp_path / "videos", ["a"])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"video": str(videos / "a.mp4"), "start": 50, "end": 60}) + "\n")
    run(job(tmp_path, tmp_path / "rows.jsonl"))
    (row,) = map(json.loads, (tmp_path / "out/broken.jsonl").read_text().splitlines())
    assert "has no frames from 50 s on up to 60 s." in row["reason"]
