# SPDX-License-Identifier: Apache-2.0
"""Slots for weights: empty, filled, filled wrongly, filled afterwards. Weights are drawn: what they say is noise."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_files import draw, voice, write_video

from talkingdit.curate.decide import decide
from talkingdit.curate.job import CurateJob, curate
from talkingdit.curate.look import Look, looks
from talkingdit.curate.settings import LIMITS, CurateSettings, Limit, Watch, Write
from talkingdit.curate.slots import MODELS, SLOTS, identify_models, note_models
from talkingdit.curate.stages import ClipFindings, Person
from talkingdit.curate.stages.talking import SyncnetStage, speaker
from talkingdit.detect.light_asd import LightASD
from talkingdit.detect.syncnet import SyncNet
from talkingdit.detect.talking import heads
from talkingdit.errors import UserError

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "curate.md"


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))


def weights(file: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    torch.save(LightASD().state_dict(), file)
    return file


class Folder:
    """A job in a folder, and how often the stage that finds people has run in it."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        (tmp_path / "videos").mkdir()
        write_video(tmp_path / "videos/a.mp4", draw(20), 16, voice(1.25))

    def run(self, models: dict[str, str], limits: dict[str, Limit] | None = None, **more: Any) -> Any:
        stages = more.pop("stages", ("planted:Faces", "light_asd", "signature"))
        watch = Watch(stages=stages, models={"marks": str(self.path)} | models, fps=16, min_seconds=0.5, cut=0)
        settings = CurateSettings(watch, limits or {}, Write(anchors=False))
        return curate(
            CurateJob(self.path / "videos", self.path / "out", settings, **more), lambda *_: None, lambda _: None
        )

    @property
    def seen(self) -> int:
        return len((self.path / "seen.txt").read_text().splitlines())

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "out/figures.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_slot_that_is_filled_afterwards_runs_alone(tmp_path: Path, workers: int) -> None:
    folder = Folder(tmp_path)
    outcome = folder.run({}, workers=workers)
    assert outcome.lacking == {
        "light_asd": "not available; give: watch.models.light_asd, the file finetuning_TalkSet.model or "
        "pretrain_AVA_CVPR.model of Light-ASD's authors."
    }
    (before,) = outcome.decisions.clips
    assert not any(name.startswith("active_speaker") for name in before.figures)
    one = {"light_asd": str(weights(tmp_path / "one.model", 0))}
    outcome = folder.run(one, workers=workers)
    (clip,) = outcome.decisions.clips
    assert outcome.lacking == {}
    assert folder.seen == 1  # people were not looked for again
    assert len(folder.records) == 2
    assert {n: v for n, v in clip.figures.items() if not n.startswith("active_speaker")} == before.figures
    assert len(clip.figures["active_speaker.scores"]) == 2
    assert re.fullmatch(r"one-[0-9a-f]{8}", clip.figures["active_speaker.backbone"])
    # What is measured afterwards is what would have been measured at once.
    (tmp_path / "fresh").mkdir()
    (at_once,) = Folder(tmp_path / "fresh").run(one).decisions.clips
    assert at_once.figures == clip.figures
    if workers > 1:
        return
    # A limit decides anew and watches nothing; other weights run again, alone; without any, their figures go.
    score = clip.figures["active_speaker.score"]
    (clip,) = folder.run(one, {"active_speaker.score": Limit(at_least=score + 0.1)}).decisions.clips
    assert (clip.removed_by, len(folder.records)) == ("active_speaker.score", 2)
    (other,) = folder.run({"light_asd": str(weights(tmp_path / "two.model", 1))}).decisions.clips
    assert other.figures["active_speaker.backbone"].startswith("two-")
    assert other.figures["active_speaker.scores"] != clip.figures["active_speaker.scores"]
    assert (len(folder.records), folder.seen) == (3, 1)
    outcome = folder.run({})
    assert (outcome.decisions.clips[0].figures, len(folder.records)) == (before.figures, 3)
    assert set(outcome.lacking) == {"light_asd"}


def test_where_what_was_found_is_gone_all_is_measured_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.run({}, stages=("planted:Faces",))
    (clip,) = folder.records[0]["clips"]
    (tmp_path / "out" / clip["found"]).unlink()
    (again,) = folder.run({}).decisions.clips
    assert (folder.seen, "signature.pictures" in again.figures) == (2, True)


def test_what_stages_found_comes_back_as_it_was(tmp_path: Path) -> None:
    from planted import Faces

    write_video(tmp_path / "a.mp4", draw(16), 16, voice(1.0))
    (look,) = looks(tmp_path / "a.mp4", Watch(fps=16), find_cuts=False)
    found = ClipFindings()
    Faces(Watch(models={"marks": str(tmp_path)})).measure(look, found)
    found.people[1].speaking = np.arange(16, dtype=np.float32)
    back = ClipFindings.unpacked(found.packed())
    assert replace(back, people=[]) == replace(found, people=[])
    for one, other in zip(back.people, found.people, strict=True):
        for name, value in vars(other).items():
            np.testing.assert_array_equal(getattr(one, name), value)


def test_cuts_that_are_known_make_the_same_clips(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", draw(40), 16, voice(2.5))
    watch = Watch(fps=16, clip_seconds=1.0)
    clips = list(looks(tmp_path / "a.mp4", watch, cuts=[0.25, 1.25]))
    assert [(c.start, len(c.pictures), c.shot) for c in clips] == [
        (0, 4, 0),
        (0.25, 16, 1),
        (1.25, 16, 2),
        (2.25, 4, 2),
    ]


def test_who_speaks() -> None:
    heard = np.array([True] * 6 + [False] * 4)
    talks, listens = np.where(heard, 2.0, -3.0).astype(np.float32), np.full(10, -1.0, np.float32)
    own = speaker([talks, listens], heard)
    assert (own["active_speaker.score"], own["active_speaker.person"], own["active_speaker.share"]) == (2.0, 0, 1.0)
    figures = {"right": own, "wrong": speaker([listens, talks], heard), "nobody": speaker([listens, listens], heard)}
    rows = [{"number": n, "start": n, "end": n + 3, "figures": one} for n, one in enumerate(figures.values())]
    record = {"key": "v", "path": "/v.mp4", "clips": rows, "error": "", "lacking": {}}
    limits = {name: limit for name, limit in LIMITS.items() if name.startswith("active_speaker")}
    removed = [clip.removed_by for clip in decide([record], CurateSettings(limits=limits)).clips]
    assert removed == ["", "active_speaker.is_largest", "active_speaker.score"]


def test_syncnet_signs_what_it_measures(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SyncNet().eval()
    torch.save(network.state_dict(), tmp_path / "syncnet_v2.model")
    rng = np.random.default_rng(0)
    pictures, samples = rng.integers(0, 256, (26, 60, 80, 3), dtype=np.uint8), rng.normal(0, 0.1, 16640)
    told: dict[str, Any] = {"video": Path("a.mp4"), "number": 0, "shot": 0, "start": 0.0, "fps": 25.0, "size": (60, 80)}
    look = Look(**told, pictures=pictures, stills=[], samples=samples.astype(np.float32))
    boxes = np.tile(np.array([20, 10, 60, 50], np.float32), (26, 1))
    stage = SyncnetStage(Watch(models={"syncnet": str(tmp_path / "syncnet_v2.model")}))
    stage.backbone = "mine"
    assert stage.measure(look, ClipFindings(people=[Person(boxes, 1.0, boxes[:, 0])])) == {}  # nobody speaks
    figures = stage.measure(look, ClipFindings([Person(boxes, 1.0, boxes[:, 0])], [(0.0, 1.0)]))
    expected = network.judge(heads(pictures, boxes), 25.0, look.samples)
    assert figures["syncnet.confidence"] == pytest.approx(expected.confidence, abs=1e-3)
    assert figures["syncnet.distance"] == pytest.approx(expected.distance, abs=1e-3)
    assert (figures["syncnet.offset"], figures["syncnet.backbone"]) == (expected.offset, "mine")


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "no such model"}')
    return path


def _file(path: Path) -> Path:
    path.write_bytes(b"nothing of the kind")
    return path


WRONG: list[tuple[str, Callable[[Path], Path]]] = [
    *((slot, lambda path: path) for slot in ("syncnet", "light_asd", "language", "caption", "expression")),
    *((slot, _file) for slot in ("syncnet", "light_asd", "language", "caption", "expression")),
    *((slot, _folder) for slot in ("syncnet", "light_asd", "language", "caption")),
]


@pytest.mark.parametrize(("slot", "make"), WRONG)
def test_what_does_not_fit_a_slot_is_one_sentence(tmp_path: Path, slot: str, make: Callable[[Path], Path]) -> None:
    write_video(tmp_path / "a.mp4", draw(16), 16, voice(1.0))
    given = make(tmp_path / "given.model")
    stages = (slot,) if slot != "expression" else ("picture",)
    job = CurateJob(
        tmp_path / "a.mp4", tmp_path / "out", CurateSettings(Watch(stages=stages, models={slot: str(given)}, cut=0))
    )
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(json.dumps({"video": "a.mp4"}) + "\n")
    with pytest.raises(UserError, match=re.escape(slot) + r".*|.*given\.model") as caught:
        curate(replace(job, source=manifest), lambda *_: None, lambda _: None)
    assert "\n" not in str(caught.value)
    assert "given.model" in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))  # so that the next command may use the folder


def test_a_function_of_no_module_is_told() -> None:
    with pytest.raises(UserError, match=r"watch.models.verify = 'nowhere:look': there is no such module"):
        identify_models(Watch(models={"verify": "nowhere:look"}))


def test_large_weights_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(models={"light_asd": str(weights(tmp_path / "one.model", 0)), "verify": "planted:Quick"})
    first = identify_models(watch, tmp_path / MODELS)
    assert set(first) == {"light_asd", "verify"}
    note_models(watch, first, tmp_path / MODELS)

    def never(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("talkingdit.curate.slots.identify", never)
    assert identify_models(watch, tmp_path / MODELS) == first
    weights(tmp_path / "one.model", 1)
    with pytest.raises(AssertionError, match="read again"):
        identify_models(watch, tmp_path / MODELS)


def test_the_table_of_slots_has_them_all() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for name in SLOTS:
        assert any(row.startswith(f"| `{name}` |") for row in rows), name
