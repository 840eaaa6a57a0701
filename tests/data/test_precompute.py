# SPDX-License-Identifier: Apache-2.0
"""`talkingdit precompute`: what it keeps, and that it survives broken files and foreign folders."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from clip_files import draw, truncate, voice, write_video
from official import make_official
from precomputing import CUTTING, SETTINGS, TENSORS, assert_same, make_job, run, samples
from safetensors.torch import load as load_tensors

from talkingdit.cli.main import main
from talkingdit.data import BrokenSample, ClipRequest, encoding
from talkingdit.data.encoders import CheckpointEncoders
from talkingdit.data.on_the_fly import OnTheFly
from talkingdit.data.precompute import precompute, prepare
from talkingdit.data.shards import PrecomputedShards
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint
from talkingdit.families.wan_s2v.clips import encode_clip
from talkingdit.families.wan_s2v.clips import encoders as encoders_of
from talkingdit.media.files import read_audio
from talkingdit.models import load_checkpoint


def test_precomputed_equals_on_the_fly(videos: Path, whole: Path, encoders: CheckpointEncoders) -> None:
    """But for the precision of the storage; the first video is as long as a clip, so that nothing is drawn."""
    source = OnTheFly(videos / "m.jsonl", encoders, encode_clip, CUTTING, name="fly")
    fresh = source.sample(0, np.random.default_rng(0), ClipRequest(history=False))
    kept = samples(whole)[fresh.key]
    for name in TENSORS:
        one, other = getattr(kept, name), getattr(fresh, name)
        assert (one is None) == (other is None) == (name in ("history", "audio_history"))
        if one is not None:
            assert one.dtype == torch.float32
            assert torch.equal(one, other.bfloat16().float()), name
    assert (kept.caption, kept.kind, kept.source) == ("person 0 talks", "film", "whole")
    assert torch.equal(kept.outside["smile"], fresh.outside["smile"].bfloat16().float())
    assert torch.equal(kept.regions["face"], fresh.regions["face"].bfloat16().float())


def test_the_voice_is_what_generation_hears(videos: Path, whole: Path, checkpoint: Path) -> None:
    """With the speech encoder of the checkpoint as the pipeline loads it, on the whole file."""
    loaded = load_checkpoint(checkpoint)
    assert isinstance(loaded, WanS2VCheckpoint)
    heard = loaded.audio_encoder.features(read_audio(videos / "0.wav"), 16)
    kept = next(sample for key, sample in samples(whole).items() if key.startswith("0-"))
    assert kept.audio is not None
    assert torch.equal(kept.audio, heard.bfloat16().float())
    text = loaded.text_encoder.encode(["person 0 talks"])
    assert kept.text is not None
    assert torch.equal(kept.text, text.features[0, text.mask[0]].bfloat16().float())
    empty = PrecomputedShards(whole).empty_text
    assert empty is not None
    assert torch.equal(empty, loaded.text_encoder.encode([""]).features[0].bfloat16().float())


def test_clips_with_and_without_history(whole: Path) -> None:
    """41 pictures: one clip at the beginning, two that go on behind nine pictures."""
    found = {key.split("-")[-1]: sample for key, sample in samples(whole).items() if key.startswith("1-")}
    assert set(found) == {"000000b", "000009h", "000025h"}
    history = found["000009h"].history
    assert history is not None
    assert history.shape[1:] == (3, 4, 6)
    assert found["000000b"].history is None
    ahead = found["000009h"].audio_history
    first = found["000000b"].audio
    assert ahead is not None
    assert first is not None
    assert torch.equal(ahead, first[..., 4:9])


def test_any_program_that_knows_webdataset_reads_the_shards(whole: Path) -> None:
    shards = [str(path) for path in sorted(whole.glob("*.tar"))]
    rows = {row["__key__"]: row for row in webdataset.WebDataset(shards, shardshuffle=False)}
    found = samples(whole)
    assert set(rows) == set(found)
    for key, row in rows.items():
        assert torch.equal(load_tensors(row["safetensors"])["latents"].float(), found[key].latents)
        assert json.loads(row["json"])["caption"] == found[key].caption


def test_shapes_are_known_without_reading_clips(whole: Path) -> None:
    source = PrecomputedShards(whole, "mine")
    for index in range(len(source)):
        shape, sample = source.shape(index), source.sample(index, np.random.default_rng(0), ClipRequest())
        assert (shape.frames, shape.height, shape.width) == tuple(sample.latents.shape[1:])
        assert shape.history == (0 if sample.history is None else sample.history.shape[1])
        assert (shape.kind, shape.fps, shape.resizable) == (sample.kind, 16.0, False)


def test_less_may_be_asked_for_and_more_may_not(whole: Path) -> None:
    source = PrecomputedShards(whole)
    index = next(i for i in range(len(source)) if source.shape(i).history and source.shape(i).frames == 4)
    full = source.sample(index, np.random.default_rng(0), ClipRequest())
    part = source.sample(index, np.random.default_rng(0), ClipRequest(frames=2, height=4, width=6, history=False))
    assert torch.equal(part.latents, full.latents[:, :2])
    assert part.audio is not None
    assert full.audio is not None
    assert torch.equal(part.audio, full.audio[..., :8])
    assert part.history is part.audio_history is None
    with pytest.raises(ValueError, match=r"has 4 latent frames of 4 x 6, asked for 5 of 4 x 6"):
        source.sample(index, np.random.default_rng(0), ClipRequest(frames=5))
    with pytest.raises(ValueError, match=r"asked for 4 of 8 x 6"):
        source.sample(index, np.random.default_rng(0), ClipRequest(height=8))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """One good video among files that are wrong in every way."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "good.mp4", draw(16), 16, voice(1))
    truncate(write_video(tmp_path / "truncated.mp4", noise, 16, voice(4)), 0.6)
    truncate(write_video(tmp_path / "headless.mp4", draw(16), 16, voice(1), front=False), 0.7)
    write_video(tmp_path / "silent.mp4", draw(16), 16, np.zeros(16000, np.float32))
    write_video(tmp_path / "dumb.mp4", draw(16), 16)
    write_video(tmp_path / "short.mp4", draw(5), 16, voice(5 / 16))
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("nothing to be seen here")
    names = ["truncated", "headless", "silent", "dumb", "short", "empty", "text", "missing", "good"]
    lines = [f"{name}.mp4,{name}," for name in names] + ["good.mp4,no audio,missing.wav"]
    (tmp_path / "m.csv").write_text("video,prompt,input_audio\n" + "\n".join(lines) + "\n")
    return tmp_path


def test_broken_files_are_skipped_counted_and_listed(
    broken: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = broken / "out"
    arguments = ["precompute", "--manifest", str(broken / "m.csv"), "--checkpoint", str(checkpoint), "-o", str(out)]
    arguments += ["--clip-frames", "16", "--max-area", "48x32", "--shard-size", "1", "--device", "cpu"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in (out / "broken.jsonl").read_text().splitlines()]
    reasons = {row["row"].rsplit(":", 1)[1]: row["reason"] for row in rows}
    wanted = {
        "2": r"truncated.mp4 (ends before|cannot be decoded at)",
        "3": r"headless.mp4 cannot be decoded",
        "4": r"silent.mp4': expected speech, got 1.0 s of silence",
        "5": r"dumb.mp4 has no sound",
        "6": r"short.mp4 has 5 frames, too few for a clip",
        "7": r"empty.mp4 cannot be decoded",
        "8": r"text.mp4 cannot be decoded",
        "9": r"missing.mp4 does not exist",
        "11": r"missing.wav does not exist",
    }
    assert set(reasons) == set(wanted)
    for row, pattern in wanted.items():
        assert re.search(pattern, reasons[row]), reasons[row]
        assert "\n" not in reasons[row]
    keys = [about["key"] for _, about in PrecomputedShards(out).clips]
    assert any(key.startswith("good-") for key in keys)
    assert f"{len(keys)} clips encoded, {len(keys)} in all; {len(rows)} that cannot be read are listed" in said.out
    # The same again: nothing is made twice, nothing is listed twice.
    assert main(arguments) == 0
    assert "0 clips encoded" in capsys.readouterr().out
    assert len((out / "broken.jsonl").read_text().splitlines()) == len(rows)


def test_a_manifest_without_any_good_video(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.csv").write_text("video,score\nmissing.mp4,0.5\n")
    arguments = ["precompute", "--manifest", str(tmp_path / "m.csv"), "--checkpoint", str(checkpoint)]
    assert main([*arguments, "-o", str(tmp_path / "out"), "--clip-frames", "16"]) == 2
    said = capsys.readouterr().err
    assert "columns without a meaning here: score." in said
    assert "precompute: no clip could be made; 1 that cannot be read are listed in" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--fps", "25"], "holds clips made with fps 16, asked for 25; take another folder or the same settings"),
        (["--clip-frames", "20"], "holds clips made with clip_frames 16, asked for 20"),
        (["--dtype", "float32"], "holds clips made with dtype 'bfloat16', asked for 'float32'"),
        (["--what", "latents"], r"holds clips made with what \['audio', 'latents', 'text'\], asked for \['latents'\]"),
        (["--max-area", "64x64"], "holds clips made with max_area 1536, asked for 4096"),
        (["--clip-frames", "18"], "--clip-frames must be a multiple of 4, at least 4, got 18"),
        (["--what", "text"], "expected latents, and text or audio beside them, got 'text'"),
        (["--shard-size", "0"], "must be at least 1, got 0"),
    ],
)
def test_another_kind_of_clip_is_not_mixed_in(
    videos: Path, whole: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    files = ["--manifest", str(videos / "m.jsonl"), "--checkpoint", str(checkpoint), "-o", str(whole)]
    options = ["--clip-frames", "16", "--max-area", "48x32", *more]
    with contextlib.suppress(SystemExit):
        assert main(["precompute", *files, *options]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_another_checkpoint_is_not_mixed_in(videos: Path, whole: Path, tmp_path: Path) -> None:
    other = make_official(tmp_path / "other", num_layers=1, audio_inject_layers=(0,), audio_encoder_layers=2, vae_dim=4,
                          settings=SETTINGS, seed=1)  # fmt: skip
    with pytest.raises(UserError, match="holds clips made with another checkpoint"):
        prepare(make_job(videos, encoders_of(other), whole))


def test_a_folder_of_somebody_else_is_not_written_to(
    videos: Path, encoders: CheckpointEncoders, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"expected an empty folder or earlier clips, got 'thesis.tex' in it"):
        prepare(make_job(videos, encoders, tmp_path))


def test_an_index_that_is_lost_or_old_is_made_from_the_shard(whole: Path, tmp_path: Path) -> None:
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    indices = sorted(tmp_path.glob("clips-*.json"))
    wanted = samples(whole)
    indices[0].write_text('{"bytes": 1, "clips": []}')
    assert_same(samples(tmp_path), wanted)
    indices[0].unlink()
    assert_same(samples(tmp_path), wanted)


def test_damaged_shards_are_broken_samples_not_the_end(whole: Path, tmp_path: Path) -> None:
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = PrecomputedShards(tmp_path)
    shard, about = source.clips[0]
    data = bytearray(Path(shard).read_bytes())
    data[about["offset"] : about["offset"] + 8] = b"\xff" * 8
    Path(shard).write_bytes(data)
    with pytest.raises(BrokenSample, match=about["key"]):
        source.sample(0, np.random.default_rng(0), ClipRequest())
    Path(shard).unlink()
    with pytest.raises(BrokenSample, match="cannot be read"):
        source.sample(0, np.random.default_rng(0), ClipRequest())
    with pytest.raises(UserError, match="expected shards that `talkingdit precompute` has written, got none"):
        PrecomputedShards(tmp_path)


def test_shards_behind_an_address_are_read_too(whole: Path) -> None:
    """Object stores are addressed like this; only ranges of bytes are asked for."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in whole.iterdir():
        memory.pipe_file(f"/clips/{path.name}", path.read_bytes())
    try:
        source = PrecomputedShards("memory://clips")
        assert source.name == "clips"
        assert len(source) == len(PrecomputedShards(whole))
        clip = source.sample(0, np.random.default_rng(0), ClipRequest())
        assert torch.equal(clip.latents, samples(whole)[clip.key].latents)
    finally:
        memory.rm("/clips", recursive=True)


def test_memory_does_not_grow_with_the_video(
    encoders: CheckpointEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more pictures are held than a clip and its past have, however long the video is."""
    write_video(tmp_path / "long.mp4", np.tile(draw(27), (6, 1, 1, 1)), 16, voice(162 / 16))
    (tmp_path / "m.jsonl").write_text('{"video": "long.mp4"}\n')
    held: list[int] = []
    read = encoding.read_clip
    monkeypatch.setattr(
        encoding, "read_clip", lambda path, wanted, size: held.append(len(wanted)) or read(path, wanted, size)
    )
    job = make_job(tmp_path, dataclasses.replace(encoders, what=("latents",)), tmp_path / "out")
    assert sum(step.clips for step in run(job)) == 11
    assert max(held) == 9 + 16
    assert [s.audio for s in samples(job.out).values()] == [None] * 11


def test_two_runs_into_one_folder_do_not_meet(
    videos: Path, encoders: CheckpointEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is told who is there; processes of one torchrun share the folder."""
    job = make_job(videos, encoders, tmp_path / "out")
    who = rf"out: another run \(talkingdit precompute, process {os.getpid()} on "
    with prepare(job), pytest.raises(UserError, match=who):
        prepare(job)
    assert {path.name for path in job.out.iterdir()} == {"precompute.json"}
    for name, value in {"WORLD_SIZE": "2", "MASTER_PORT": "1234", "TORCHELASTIC_RUN_ID": "one"}.items():
        monkeypatch.setenv(name, value)
    with prepare(job, 0), prepare(job, 1):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
        with pytest.raises(UserError, match="another run"):
            prepare(job, 0)


@pytest.mark.parametrize("name", ["precompute.json", "broken.jsonl", "empty_text.safetensors", ".lock"])
def test_links_out_of_a_folder_are_not_written_through(
    videos: Path, encoders: CheckpointEncoders, tmp_path: Path, name: str
) -> None:
    job = make_job(videos, encoders, tmp_path / "out")
    prepare(job).release()
    (job.out / name).unlink(missing_ok=True)
    (job.out / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError):
        prepare(job)
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("name", [".tmpAb3dEf", ".nfs0001", ".DS_Store", ".part-0000-x.tar"])
def test_what_a_library_or_a_file_system_leaves_does_not_stop_a_run(
    videos: Path, encoders: CheckpointEncoders, tmp_path: Path, name: str
) -> None:
    job = make_job(videos, encoders, tmp_path / "out")
    job.out.mkdir()
    (job.out / name).touch()
    prepare(job).release()


def test_a_disk_that_is_full_is_one_sentence_wherever_it_is_met(
    videos: Path, encoders: CheckpointEncoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    from talkingdit.data import claims, shards
    from talkingdit.data import precompute as module

    for at, names in ((module, ("write_whole", "append_line")), (claims, ("write_whole",)), (shards, ("write_whole",))):
        for attribute in names:
            job = make_job(videos, encoders, tmp_path / f"{at.__name__} {attribute}")
            with prepare(job), monkeypatch.context() as patch:
                patch.setattr(at, attribute, full)
                if attribute == "append_line":
                    patch.setattr(module, "open_item", lambda *_: (_ for _ in ()).throw(BrokenSample("a", "broken")))
                with pytest.raises(UserError, match="No space left on device"):
                    precompute(job)
            assert not [path for path in job.out.iterdir() if path.name.startswith(".")]
