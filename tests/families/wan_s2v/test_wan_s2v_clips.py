# SPDX-License-Identifier: Apache-2.0
"""A training clip is what generation feeds the model for the same pictures: latents, past, voice, pose."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_files import RATE, draw, voice, write_video
from diffusers import AutoencoderKLWan
from PIL import Image
from tiny_s2v import Voice, make_s2v

from talkingdit.autoencoders.streaming import to_video
from talkingdit.autoencoders.tail import decode_after
from talkingdit.data.cutting import Cut, Cutting, Item, open_item
from talkingdit.data.encoders import Encoders
from talkingdit.data.manifest import Entry, read_manifest
from talkingdit.data.on_the_fly import OnTheFly
from talkingdit.data.probe import Media, Probes
from talkingdit.data.sample import BrokenSample, ClipRequest, Sample
from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint, WanS2VSettings
from talkingdit.families.wan_s2v.clips import encode_clip
from talkingdit.families.wan_s2v.conditions import WanInputs
from talkingdit.families.wan_s2v.options import Options
from talkingdit.families.wan_s2v.outline import Sampling
from talkingdit.families.wan_s2v.pipeline import WanS2VPipeline
from talkingdit.media.files import read_audio, read_video
from talkingdit.media.pose import PoseVideo
from talkingdit.puppets.render import mouth_boxes, render
from talkingdit.puppets.world import Motion, Scene

SIZE = (32, 48)
CLIP = 80  # frames, as released
MOTION = 73


@pytest.fixture(scope="module")
def checkpoint() -> WanS2VCheckpoint:
    return make_s2v(settings={"steps": 1, "guidance": 1.0})


@pytest.fixture(scope="module")
def encoders(checkpoint: WanS2VCheckpoint) -> Encoders:
    return Encoders(checkpoint.vae, checkpoint.settings, checkpoint.text_encoder, checkpoint.audio_encoder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips' worth of a video with its voice, a pose video and a portrait."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "v.mp4", draw(2 * CLIP, SIZE), 16, voice(2 * CLIP / 16))
    write_video(folder / "pose.mp4", draw(2 * CLIP, SIZE)[::-1], 16)
    Image.fromarray(draw(5, SIZE)[3]).save(folder / "face.png")
    row = '{"video": "v.mp4", "pose": "pose.mp4", "reference": "face.png", "caption": "a person talks"}\n'
    (folder / "m.jsonl").write_text(row)
    return folder


def item_of(folder: Path, settings: WanS2VSettings, **changes: Any) -> Item:
    entry = dataclasses.replace(read_manifest(folder / "m.jsonl").entries[0], **changes)
    return open_item(entry, Probes(folder / "m.jsonl"), settings.fps)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class Fed(Exception):
    """What the pipeline gives the model."""


def fed(
    checkpoint: WanS2VCheckpoint, folder: Path, index: int, still: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], torch.Tensor]:
    """What the model is given for clip `index` if the clips before had made the pictures of the file, and its past."""
    caught: dict[str, Any] = {}

    def spy(inputs: WanInputs, **_: Any) -> None:
        caught.update(vars(inputs))
        raise Fed

    monkeypatch.setattr(checkpoint.transformer, "encode_conditions", spy)
    pipeline = WanS2VPipeline(checkpoint)
    sampling = Sampling.of(Options(clip_frames=CLIP, start_from_reference=still), checkpoint.settings)
    frames, sound, _, rate = read_video(folder / "v.mp4")
    portrait = frames[0] if still else draw(5, SIZE)[3]
    assert sound is not None
    assert rate == RATE
    features = checkpoint.audio_encoder.features(read_audio(folder / "v.mp4")[: 2 * CLIP * RATE // 16], 2 * CLIP)
    poses = PoseVideo(folder / "pose.mp4", 16).clips(CLIP, SIZE, first=index)
    video = pipeline.conditions(portrait, "a person talks", sampling, features, pose=lambda _: next(poses))
    carry, before = None, to_video(portrait[None])
    if index:
        before = to_video(frames[CLIP - MOTION : CLIP])
        shown = to_video(frames[3:CLIP])  # the first clip lacks three frames
        carry = pipeline._carry({}, shown, sampling, None)
    elif still:
        before = pipeline._beginning(video)["window"]
    with pytest.raises(Fed):
        pipeline.clip(video, index, carry, last=True)
    return caught, before


def close(given: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    """Equal but for rounding."""
    assert given is not None
    wanted = wanted[0]
    return given.shape == wanted.shape and float((given - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize(("index", "still"), [(0, False), (1, False), (0, True)])
def test_a_clip_is_what_generation_feeds_the_model(
    checkpoint: WanS2VCheckpoint,
    encoders: Encoders,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: int,
    still: bool,
) -> None:
    """The first clip, one that goes on, and one that starts from the reference picture."""
    item = item_of(folder, checkpoint.settings)
    assert item.frames == 2 * CLIP
    sample = encode_clip(item, Cut(index * CLIP, CLIP, history=index == 1, still=still), SIZE, encoders, rng())
    wanted, before = fed(checkpoint, folder, index, still, monkeypatch)
    assert close(sample.reference, wanted["reference"])
    assert close(sample.audio, wanted["audio"])
    assert close(sample.pose, wanted["pose"])
    assert sample.text is not None
    assert close(sample.text, wanted["text"][:, : len(sample.text)])
    assert tuple(sample.latents.shape[1:]) == wanted["size"]
    if index or still:
        assert close(sample.history, wanted["history"])
        assert wanted["history"].shape[2] == 19
    else:
        assert wanted["history"] is None
        assert sample.history is None
    # Generation decodes the clip behind its past: what the encoder makes of the clip when it has seen that past.
    clip = to_video(read_video(folder / "v.mp4")[0][index * CLIP : (index + 1) * CLIP])
    vae: Any = checkpoint.vae
    with torch.no_grad():
        mode = vae.encode(torch.cat([before, clip], dim=2)).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    latents = ((mode[0] - mean) / std)[:, -CLIP // 4 :]
    assert float((sample.latents - latents).abs().max()) < 1e-4


@pytest.mark.parametrize("history", [False, True])
def test_the_shipped_autoencoder_decodes_a_clip_to_its_frames(tmp_path: Path, history: bool) -> None:
    """Decoded behind the past, as generation does it, picture p comes back as picture p and not as its neighbour."""
    import talkingdit.puppets

    vae = AutoencoderKLWan.from_pretrained(Path(talkingdit.puppets.__path__[0]) / "assets" / "model" / "vae").eval()
    generator = np.random.default_rng(1)
    scene, motion = Scene.random(generator, "train"), [Motion.random(generator, 25)]
    opening = (np.arange(25) % 3 == 0).astype(np.float32)  # a mouth that opens in every third picture
    pictures = render(scene, opening[None], np.full((1, 25), 0.5, np.float32), motion, 96)
    path = write_video(tmp_path / "v.mp4", pictures, 16)
    item = Item(Entry("k", "m:1", path, silent=True), Media(25 / 16, 16, 96, 96), 25)
    start = 9 if history else 0
    encoders = Encoders(vae, WanS2VSettings(motion_frames=9))
    sample = encode_clip(item, Cut(start, 16, history), (96, 96), encoders, rng())
    past = sample.history if history else sample.reference
    assert past is not None
    decoded = decode_after(vae, past[None], sample.latents[None])[0]
    boxes = mouth_boxes(scene, motion)[0] * 96
    (x0, y0), (x1, y1) = np.floor(boxes[:, :2].min(0)).astype(int), np.ceil(boxes[:, 2:].max(0)).astype(int)
    first = 4  # the blurred beginning behind a reference that shows another moment
    errors = []
    for shift in (-1, 0, 1):
        shown = to_video(pictures)[0, :, start + first + shift : start + 15 + shift]
        errors.append(float((decoded[:, first:15] - shown)[:, :, y0:y1, x0:x1].square().mean()))
    assert errors[1] < 0.5 * min(errors[0], errors[2])


def test_the_voice_before_a_clip_goes_with_it(checkpoint: WanS2VCheckpoint, encoders: Encoders, folder: Path) -> None:
    item = item_of(folder, checkpoint.settings, pose=None)
    whole = encode_clip(item, Cut(0, CLIP), SIZE, encoders, rng())
    later = encode_clip(item, Cut(MOTION, 8, history=True), SIZE, encoders, rng())
    first = encode_clip(item, Cut(40, 8), SIZE, encoders, rng())
    assert whole.audio is not None
    assert later.audio_history is not None
    assert torch.equal(later.audio_history, whole.audio[..., MOTION - 5 : MOTION])
    assert first.audio is not None
    assert first.audio_history is None
    assert torch.equal(first.audio, whole.audio[..., 40:48])


def test_a_long_voice_is_heard_in_parts_and_sounds_the_same(
    checkpoint: WanS2VCheckpoint, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory must not grow with the recording; an encoder that hears each picture alone shows every shift."""
    item = item_of(folder, checkpoint.settings)
    heard: list[float] = []

    class Ear(Voice):
        def features(self, waveform: Any, frames: int) -> torch.Tensor:
            heard.append(len(waveform) / RATE)
            return super().features(waveform, frames)

    def speech(first: int, count: int) -> torch.Tensor:
        encoders = Encoders(checkpoint.vae, checkpoint.settings, audio=Ear())
        return encoders.speech(item.entry, item.video, item.frames, first, count)

    whole = speech(0, 2 * CLIP)
    assert heard == [10.0]
    monkeypatch.setattr("talkingdit.data.encoders.PART_SECONDS", 2)
    monkeypatch.setattr("talkingdit.data.encoders.MARGIN_SECONDS", 1)
    for first, count in ((0, 40), (20, 80), (120, 40), (31, 2)):
        part = speech(first, count)
        assert float((part - whole[..., first : first + count]).abs().max()) < 0.01 * float(whole.abs().max())
    assert max(heard[1:]) <= 4.0


def test_a_clip_begins_with_its_entry(tmp_path: Path, checkpoint: WanS2VCheckpoint, encoders: Encoders) -> None:
    """An entry that begins at second 2 is the same as a file that begins there; pictures, voice and pose."""
    pictures, sound = draw(80, SIZE), voice(5)
    write_video(tmp_path / "v.mp4", pictures, 16, sound)
    write_video(tmp_path / "cut.mkv", read_video(tmp_path / "v.mp4")[0][32:], 16)
    (tmp_path / "m.jsonl").write_text('{"video": "v.mp4"}\n')
    inside = item_of(tmp_path, checkpoint.settings, start=2.0, end=4.5)
    assert inside.frames == 40
    sample = encode_clip(inside, Cut(4, 16), SIZE, encoders, rng())
    whole = encode_clip(item_of(tmp_path, checkpoint.settings), Cut(36, 16), SIZE, encoders, rng())
    assert sample.audio is not None
    assert whole.audio is not None
    assert float((sample.audio - whole.audio).abs().max()) < 0.02 * float(whole.audio.abs().max())
    same = dataclasses.replace(inside.entry, video=tmp_path / "v.mp4", reference=tmp_path / "r.png")
    Image.fromarray(pictures[0]).save(tmp_path / "r.png")
    late = encode_clip(dataclasses.replace(inside, entry=same), Cut(4, 16), SIZE, encoders, rng())
    early = dataclasses.replace(same, start=0.0, end=None)
    full = encode_clip(item_of(tmp_path, checkpoint.settings, **_fields(early)), Cut(36, 16), SIZE, encoders, rng())
    assert torch.equal(late.latents, full.latents)


def _fields(entry: Entry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}


def test_frames_from_outside_and_regions_come_with_the_clip(
    tmp_path: Path, checkpoint: WanS2VCheckpoint, encoders: Encoders
) -> None:
    write_video(tmp_path / "v.mp4", draw(27, SIZE), 16)
    Image.fromarray(draw(9, SIZE)[8]).save(tmp_path / "smile.png")
    row = {
        "video": "v.mp4",
        "audio": "none",
        "outside": {"smile": ["smile.png", 0.5]},
        "regions": {"up": [0, 0, 1, 0.5]},
    }
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    sample = encode_clip(item_of(tmp_path, checkpoint.settings), Cut(8, 8), SIZE, encoders, rng())
    assert sample.audio is None
    from_file, from_video = sample.outside["smile"].unbind(1)
    decoded = read_video(tmp_path / "v.mp4")[0]
    assert torch.equal(from_file, encoders.latents(draw(9, SIZE)[8:9])[:, 0])
    assert torch.equal(from_video, encoders.latents(decoded[8:9])[:, 0])
    assert sample.regions["up"].shape == (2, 4, 6)
    assert torch.equal(sample.regions["up"][:, :, 0], torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, 4))


def test_an_image_is_a_clip_of_one_latent(tmp_path: Path, checkpoint: WanS2VCheckpoint, encoders: Encoders) -> None:
    Image.fromarray(draw(3, SIZE)[2]).save(tmp_path / "a.png")
    (tmp_path / "m.jsonl").write_text('{"video": "a.png", "caption": "x"}\n')
    source = OnTheFly(tmp_path / "m.jsonl", encoders, encode_clip, Cutting(max_area=32 * 48, multiple=16))
    shape = source.shape(0)
    assert (shape.frames, shape.history, shape.kind) == (1, 0, "image")
    sample = source.sample(0, rng(), ClipRequest())
    assert torch.equal(sample.latents, encoders.latents(draw(3, SIZE)[2:3]))
    assert sample.audio is None
    assert sample.history is None


def cuts(frames: int, **changes: Any) -> list[tuple[int, int, str]]:
    item = Item(Entry("k", "m:1", Path("v.mp4")), Media(frames / 16, 16, 32, 32), frames)
    return [(cut.start, cut.frames, cut.key(item.entry)[-1]) for cut in Cutting(**changes).cuts(item, MOTION)]


def test_which_clips_are_cut() -> None:
    assert cuts(39) == []
    assert cuts(40) == [(0, 40, "b")]
    assert cuts(112) == [(0, 80, "b")]
    assert cuts(113) == [(0, 80, "b"), (73, 40, "h")]
    assert cuts(250) == [(0, 80, "b"), (73, 80, "h"), (153, 80, "h")]
    assert cuts(250, openings="none", stride=40) == [*((73, 80, "h"), (113, 80, "h"), (153, 80, "h"), (193, 56, "h"))]
    assert cuts(113, stills=True) == [(0, 80, "b"), (0, 80, "s"), (73, 40, "h")]
    assert cuts(200, openings="all") == [(0, 80, "b"), (73, 80, "h"), (80, 80, "b"), (153, 44, "h"), (160, 40, "b")]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"clip_frames": 81}, "clip_frames must be a multiple of 4"),
        ({"min_frames": 84}, r"min_frames must be at most clip_frames \(80\)"),
        ({"openings": "some"}, "openings must be one of first, all, none"),
        ({"multiple": 24}, "multiple must be a multiple of 16"),
        ({"stride": -1}, "stride must be at least 0"),
    ],
)
def test_impossible_cuts_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cutting(**wrong)


@pytest.fixture(scope="module")
def source(folder: Path, encoders: Encoders) -> OnTheFly:
    return OnTheFly(
        folder / "m.jsonl", encoders, encode_clip, Cutting(clip_frames=16, min_frames=8, max_area=32 * 48, multiple=16)
    )


def same(a: Sample, b: Sample) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("latents", "audio", "reference", "history", "pose")]
    return a.key == b.key and all(x is y is None or torch.equal(x, y) for x, y in pairs)


def test_requests_are_followed(source: OnTheFly) -> None:
    shape = source.shape(0)
    assert (shape.frames, shape.height, shape.width, shape.history, shape.resizable) == (4, 4, 6, 19, True)
    sample = source.sample(0, rng(), ClipRequest(frames=2, height=6, width=4, history=True))
    assert sample.latents.shape[1:] == (2, 6, 4)
    assert sample.history is not None
    assert sample.history.shape[1:] == (19, 6, 4)
    assert sample.pose is not None
    assert sample.pose.shape == sample.latents.shape
    assert sample.audio is not None
    assert sample.audio.shape[2] == 8
    assert sample.source == "m"
    assert source.sample(0, rng(), ClipRequest(history=False)).history is None
    with pytest.raises(ValueError, match="has 4 latent frames, asked for 5"):
        source.sample(0, rng(), ClipRequest(frames=5))


def test_the_same_numbers_draw_the_same_clip(source: OnTheFly) -> None:
    """A resumed run draws its samples again; other numbers draw others."""
    assert same(
        source.sample(0, np.random.default_rng(3), ClipRequest()),
        source.sample(0, np.random.default_rng(3), ClipRequest()),
    )
    keys = {source._cut(source.items[0], 4, None, np.random.default_rng(i)) for i in range(100)}
    assert len(keys) > 40
    openings = [cut for cut in keys if not cut.history]
    assert 0 < len(openings) < len(keys)


def test_files_that_break_later_are_broken_samples(tmp_path: Path, encoders: Encoders) -> None:
    write_video(tmp_path / "good.mp4", draw(27), 16, voice(1.7))
    write_video(tmp_path / "bad.mp4", draw(27), 16, voice(1.7))
    write_video(tmp_path / "short.mp4", draw(5), 16, voice(0.4))
    rows = [json.dumps({"video": f"{name}.mp4"}) for name in ("good", "bad", "short", "gone")]
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    source = OnTheFly(tmp_path / "m.jsonl", encoders, encode_clip, Cutting(clip_frames=16, min_frames=8, multiple=16))
    assert len(source) == 2
    reasons = {error.key.split("-")[0]: error.reason for error in source.broken}
    assert "has 5 frames, at least 8 are needed" in reasons["short"]
    assert "does not exist" in reasons["gone"]
    (tmp_path / "bad.mp4").write_bytes(b"")
    assert source.sample(0, rng(), ClipRequest()).latents.isfinite().all()
    with pytest.raises(BrokenSample, match=r"bad-\w+-\d+[hb]: .*bad.mp4"):
        source.sample(1, rng(), ClipRequest())
