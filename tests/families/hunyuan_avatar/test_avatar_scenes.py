# SPDX-License-Identifier: Apache-2.0
"""Drawn scenes of several people: what training is given, a short run from voices to a model, and its measures."""

from __future__ import annotations

import json
from pathlib import Path

import forked
import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open

from talkingdit.data.sample import ClipRequest, flaw
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar import drawn, evaluate
from talkingdit.families.hunyuan_avatar.drawn import PEOPLE, DrawnScenes, Scenes, box_mask, draw_video, precompute
from talkingdit.families.hunyuan_avatar.samples import emotion_track
from talkingdit.families.puppet.drawn import read_voices
from talkingdit.puppets import MODEL, VOICE
from talkingdit.puppets.probe import probe
from talkingdit.puppets.scenes import face_boxes

CONFIG = Path(__file__).parents[3] / "training" / "configs" / "hunyuan_avatar_scenes.toml"


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recording of each split, from that which ships."""
    folder = tmp_path_factory.mktemp("voices")
    samples, rate = soundfile.read(VOICE, dtype="float32")
    rows = []
    for split, part in (("train", samples[: 4 * rate]), ("held_out", samples[2 * rate : 6 * rate])):
        soundfile.write(folder / f"{split}.flac", part, rate)
        rows.append({"path": f"{split}.flac", "speaker": split, "language": "en", "split": split})
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def scenes(voices: Path, tmp_path_factory: pytest.TempPathFactory) -> DrawnScenes:
    return DrawnScenes(voices, MODEL / "vae", tmp_path_factory.mktemp("cache"), videos=4, latents=3, size=64, fps=16)


def test_videos_show_what_their_voices_say(scenes: DrawnScenes) -> None:
    """The mouths of those who hear follow the sound of their column; nobody else moves; masks hold the faces."""
    voices = read_voices(scenes.voices, "train", 16)
    seen: set[tuple[int, bool]] = set()
    changes = set()
    wide = DrawnScenes(**{**vars(scenes), "latents": 4, "size": 128})
    for seed in range(12):
        clip = draw_video(np.random.default_rng(seed), voices, wide)
        people = len(clip.play.scene.characters)
        seen.add((people, clip.mood_pictures is not None))
        assert clip.columns.shape == (PEOPLE, 2, 160, 32)
        assert clip.play.openings.shape == (people, 29)
        opening = probe(clip.play.draw(128), people).opening
        for i in range(PEOPLE):
            if i >= people:
                assert not clip.masks[i].any()
                assert not clip.columns[i].any()
            elif clip.play.openings[i].any():
                assert clip.masks[i].any()
                at = [voice for voice in voices for start in range(len(voice.opening) - 31)
                      if torch.equal(clip.columns[i], voice.features[..., start : start + 32])
                      and np.array_equal(clip.play.openings[i], voice.opening[start + 3 : start + 32])]  # fmt: skip
                assert at, "the first three columns are not of the clip"
            else:
                assert opening[i].std() < 0.03
        if clip.play.moods is not None:
            assert clip.mood_pictures is not None
            latents = [clip.play.moods[0], *clip.play.moods[4::4]]  # in the last frame of each
            first, second = (probe(picture[None]).expression[0][0] for picture in clip.mood_pictures)
            assert latents == [first] * clip.change + [second] * (8 - clip.change)
            changes.add(clip.change < 8)
    assert {people for people, _ in seen} == {1, 2, 3}
    assert {told for _, told in seen} == changes == {True, False}
    mask = box_mask(face_boxes(2)[0], 16)
    assert mask.any()
    assert not mask[:, 8:].any()


def test_an_interrupted_cache_goes_on_and_gives_good_samples(
    scenes: DrawnScenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from talkingdit.families.hunyuan_avatar import drawn

    monkeypatch.setattr(drawn, "PART", 2)
    precompute(scenes)
    first = scenes.part(0).read_bytes()
    scenes.part(1).unlink()
    with pytest.raises(ValueError, match=r"part-00001.safetensors is missing"):
        Scenes(scenes)
    precompute(scenes)
    assert scenes.part(0).read_bytes() == first
    source = Scenes(scenes)
    assert len(source) == 4
    for index in range(4):
        sample = source.sample(index, np.random.default_rng(0), ClipRequest())
        assert flaw(sample) is None
        assert sample.latents.shape == (16, 3, 8, 8)
        assert set(sample.voices) == {"voice 0", "voice 1", "voice 2"} <= set(sample.regions)
        assert sample.outside["still"].shape == sample.latents.shape
        assert torch.equal(sample.reference, sample.outside["still"][:, :1])
        assert "talking" in sample.caption
        if "emotion" in sample.outside:
            assert sample.outside["emotion"].shape == (16, 2, 8, 8)
            assert set(emotion_track(sample.regions, 2, 3).tolist()) <= {0, 1}
    assert any("emotion" in source.sample(i, np.random.default_rng(0), ClipRequest()).outside for i in range(4))
    with pytest.raises(ValueError, match="clips have 3 x 8 x 8 latents"):
        source.sample(0, np.random.default_rng(0), ClipRequest(frames=2))
    with pytest.raises(UserError, match=r"data\.vae: expected the folder of an autoencoder"):
        precompute(DrawnScenes(**{**vars(scenes), "vae": Path("nowhere")}))


def test_clips_are_windows_of_a_longer_video_that_wraps(scenes: DrawnScenes) -> None:
    """As in generation: a model that saw only beginnings of videos would begin every window like one."""
    precompute(scenes)
    source = Scenes(scenes)
    with safe_open(scenes.part(0), "pt") as file:
        told = next(row for row in range(4) if file.get_slice("told")[row : row + 1][0])
        kept = {
            name: file.get_slice(name)[told : told + 1][0].float() for name in ("latents", "still", "audio", "mouths")
        }
        change = int(file.get_slice("change")[told : told + 1][0])
    begun = set()
    for seed in range(40):
        sample = source.sample(told, np.random.default_rng(seed), ClipRequest())
        begin = next(i for i in range(6) if torch.equal(sample.latents[:, 0], kept["latents"][:, i]))
        begun.add(begin)
        window = [(begin + i) % 6 for i in range(3)]
        assert torch.equal(sample.latents, kept["latents"][:, window])
        assert torch.equal(sample.regions["mouth"], kept["mouths"][window])
        heard = [4 * latent + i for latent in window for i in range(4)]
        assert torch.equal(sample.voices["voice 0"], kept["audio"][0][..., heard])
        track = emotion_track(sample.regions, 2, 3).tolist()
        assert track == [int(latent >= change) for latent in window]
        assert torch.equal(sample.outside["still"], kept["still"][:, [min(latent, 2) for latent in window]])
        assert torch.equal(sample.outside["still"][:, :1], sample.reference)
    assert begun == set(range(6))


def test_pictures_of_emotions_count_where_their_regions_are_bright() -> None:
    assert emotion_track({}, 2, 3).tolist() == [0, 0, 0]  # no region: the first, all the time
    bright = torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None, None].expand(-1, 2, 2)
    last = torch.tensor([0.0, 0.0, 1.0, 0.0])[:, None, None].expand(-1, 2, 2)
    assert emotion_track({"emotion 0": bright, "emotion 1": last, "face": bright}, 2, 4).tolist() == [-1, 0, 1, -1]


@pytest.mark.slow
def test_a_short_run_makes_a_model_that_is_measured(
    voices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command with two steps, then every row of the measures; a second evaluation takes what is there."""
    settings = {
        "run.out": tmp_path / "run", "run.minutes": 0, "run.steps": 2, "run.device": "cpu", "run.threads": 1,
        "model.clip-latents": 3, "data.voices": voices, "data.vae": MODEL / "vae", "data.cache": tmp_path / "cache",
        "data.short-videos": 4, "data.size": 64, "batch.count": 1, "batch.size": 2, "optim.warmup-steps": 1,
        "sample.steps": 2,
    }  # fmt: skip
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    said = tmp_path / "said"
    assert forked.run(forked.training, "--config", str(CONFIG), *options, said=said, timeout=900) == 0, said.read_text()
    (exported,) = {path.parent for path in (tmp_path / "run").rglob("pipeline.json")}
    assert {path.name for path in exported.iterdir()} >= {"transformer", "vae", "text_encoder", "pipeline.json"}
    assert sum(path.stat().st_size for path in exported.rglob("*") if path.is_file()) < 2 * 12e6  # float32

    out = tmp_path / "result.json"
    asked = ["--checkpoint", str(exported), "--voices", str(voices), "--out", str(out), "--scenes", "1"]
    asked += ["--seconds", "2", "--steps", "1", "--injection", f"same={exported}"]
    assert evaluate.main(asked) == 0
    assert evaluate.main([*asked, "--sheet", str(tmp_path / "two.png")]) == 0
    assert (tmp_path / "two.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert "NaN" not in out.read_text()  # it is no JSON
    assert set(rows) == {*evaluate.ROWS, "injection same"}
    assert rows["injection same"] == rows["injection"]
    assert all(value is None or isinstance(value, float) for row in rows.values() for value in row.values())
    assert "| seams | ratio" in table
    monkeypatch.setattr(evaluate, "ROWS", dict.fromkeys(evaluate.ROWS))  # nothing is made again
    assert evaluate.main(asked) == 0
    assert capsys.readouterr().out == table
    assert evaluate.main([*asked[:1], str(MODEL), *asked[2:]]) == 2
    assert "expected a HunyuanVideo-Avatar checkpoint, got one of drawn characters" in capsys.readouterr().err


def test_borders_are_those_of_the_last_step() -> None:
    """Windows of 3 latents that move on by 1, three steps: the last ones begin at latents 1 and 4."""
    assert evaluate.borders(25, window=3, shift=1, steps=3) == [1, 13]
    assert evaluate.borders(25, window=3, shift=1, steps=1) == [9, 21]


def test_two_runs_do_not_draw_into_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the one under the settings of the other would be trained on without a word."""
    scenes = DrawnScenes(tmp_path, MODEL / "vae", tmp_path / "cache", videos=4, latents=3, size=64, fps=16)
    others, drawing = DrawnScenes(**{**vars(scenes), "size": 128}), []

    def read(*given: object) -> None:  # the other run comes by while this one draws
        drawing.append(given)
        if len(drawing) == 1:
            with pytest.raises(UserError, match=r"cache: another run \(drawing of training videos, process"):
                precompute(others)
            assert json.loads((scenes.cache / "stamp.json").read_text())["size"] == 64
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn, "read_voices", read)
    for mine in (scenes, others):  # once the first is gone, the other one's turn comes
        with pytest.raises(KeyboardInterrupt):
            precompute(mine)
    assert len(drawing) == 2
    assert {path.name for path in scenes.cache.iterdir()} == {"stamp.json"}


def test_two_evaluations_do_not_write_one_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes it whole, after every row: rows of the other would be gone."""
    asked = ["--checkpoint", str(MODEL), "--voices", str(tmp_path), "--out", str(tmp_path / "rows.json")]
    met = []

    def measured(options: object) -> dict[str, dict]:  # the other one comes by while this one measures
        met.append(options)
        if len(met) == 1:
            assert evaluate.main(asked) == 2
        return {"rows": {}}

    monkeypatch.setattr(evaluate, "run", measured)
    monkeypatch.setattr(evaluate, "table", lambda rows: "")
    assert evaluate.main(asked) == 0
    assert len(met) == 1
    assert f"evaluate: {tmp_path / 'rows.json'}: another run (an evaluation, process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
