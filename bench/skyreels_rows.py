# SPDX-License-Identifier: Apache-2.0
"""The ablations of SkyReels-Audio (arXiv:2506.00830, table 3, section 2.4) on the drawn world, see `bench.ablations`.

audio RoPE, guidance,   a held-out character speaks with the voices of held-out speakers: correlation of the mouth
facial mask loss        with the voice and its lag, identity and background
BLF                     a longer one: change from frame to frame where windows meet, against elsewhere
hybrid inference        a drawn video speaks other words: sync, and how well the model itself keeps the rest
dubbing                 the same from a file to a file: sync to the new and to the old voice, PSNR outside of the mask
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from bench import drawn_voices, record
from bench.ablations import Budget, Claim, Measured, Row, Study
from bench.drawn_anchors import FPS, SIZE, Encoder, held_out_scene, still
from talkingdit.autoencoders.streaming import to_frames
from talkingdit.checkpoints.saving import save_tensors
from talkingdit.data.sample import Sample
from talkingdit.data.shards import ShardWriter
from talkingdit.encoders.log_mel import SpeechFeatures, normalise_loudness
from talkingdit.families.puppet.drawn import Voice, mouth_cells
from talkingdit.families.skyreels_audio.checkpoint import SkyReelsAudioSettings
from talkingdit.families.skyreels_audio.known import grey_out
from talkingdit.families.skyreels_audio.load import load
from talkingdit.families.skyreels_audio.options import Options
from talkingdit.families.skyreels_audio.outline import outline
from talkingdit.families.skyreels_audio.pipeline import SkyReelsAudioPipeline
from talkingdit.families.training import EDITED
from talkingdit.families.wan_i2v.checkpoint import WanI2VCheckpoint
from talkingdit.media.edited import open_edited
from talkingdit.media.files import SPEECH_RATE, VideoWriter, read_audio
from talkingdit.models import default_checkpoint, load_checkpoint
from talkingdit.pipelines.inputs import Inputs, Job
from talkingdit.pipelines.job import make_video
from talkingdit.pipelines.long_video import generate_clips
from talkingdit.puppets.probe import measure_height, probe
from talkingdit.puppets.render import Image, mouth_boxes, render
from talkingdit.puppets.visemes import visemes_from_audio
from talkingdit.puppets.world import FloatArray, Motion, Scene

NAME = "skyreels_audio"
CLIP_LATENTS = 8
TRUNK = ("patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.", "blocks.", "head.")
BOX = (32, 40, 64, 72)  # pixels of the lower face, wherever the head sways to


class DrawnSpeech(SpeechFeatures):
    """Features of the drawn world for videos of any rate."""

    def at(self, fps: float) -> DrawnSpeech:
        return DrawnSpeech(fps=round(fps))


@functools.lru_cache(maxsize=1)
def shipped() -> Any:
    """The model that ships: its autoencoder and prompt encoder are used, its transformer is begun from."""
    return load_checkpoint(default_checkpoint())


def shipped_voice() -> tuple[FloatArray, FloatArray]:
    """The recording that ships, which no clip has, in two parts: what a video said before, and what it is to say."""
    whole = normalise_loudness(read_audio(default_checkpoint().parent / "voice.flac", SPEECH_RATE))
    half = len(whole) // 2
    return whole[:half], whole[half:]


# ---- Training data ---------------------------------------------------------------------------------------------------


def prepare(folder: Path, budget: Budget) -> None:
    """The trunk to begin from, as a video model; and the clips."""
    start = folder / f"{NAME}_start"
    if not (start / "config.json").is_file():
        start.mkdir(parents=True, exist_ok=True)
        state = shipped().transformer.state_dict()
        trunk = {name: value for name, value in state.items() if name.startswith(TRUNK)}
        save_tensors(trunk, start / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        (start / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v"}))
    write_clips(folder / f"{NAME}_clips", lambda: drawn_voices.trained(folder, budget, FPS), budget)


def write_clips(folder: Path, read: Callable[[], Sequence[Voice]], budget: Budget) -> None:
    """Draw and encode clips, as animation and as editing need them; what an earlier call has written stays."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.txt"
    first, part = int(done.read_text()) if done.is_file() else 0, 50
    voices = read() if first < budget.clips else []
    encoder = Encoder(shipped().vae, shipped().text_encoder)
    for begin in tqdm(range(first, budget.clips, part), desc="drawing clips", disable=first >= budget.clips):
        writer = ShardWriter(folder, begin // part, 1 << 30)
        for index in range(begin, min(begin + part, budget.clips)):
            rng = np.random.default_rng((budget.seed, 3, index))
            voice = voices[int(rng.integers(len(voices)))]
            writer.add(_sample(index, encoder, voice, rng), {"fps": FPS}, torch.bfloat16)
        writer.finish()
        record.write(done, str(min(begin + part, budget.clips)))


def _sample(index: int, encoder: Encoder, voice: Voice, rng: np.random.Generator) -> Sample:
    count = 4 * CLIP_LATENTS
    scene = Scene.random(rng, "train")
    begin = int(rng.integers(len(voice.opening) - count))
    opening = np.concatenate([[0.0], voice.opening[begin : begin + count]]).astype(np.float32)
    width = np.concatenate([[0.5], voice.width[begin : begin + count]]).astype(np.float32)
    motion = [Motion.random(rng, count + 1)]
    frames = render(scene, opening[None], width[None], motion, SIZE)
    whole = encoder.latents(frames)
    made = torch.zeros(CLIP_LATENTS, SIZE // 8, SIZE // 8)
    made[:, BOX[1] // 8 : BOX[3] // 8, BOX[0] // 8 : BOX[2] // 8] = 1
    return Sample(
        key=f"drawn-{index:06d}b",
        source="drawn",
        latents=whole[:, 1:],
        reference=whole[:, :1],
        audio=voice.features[:, :, begin : begin + count],
        caption=scene.caption(),
        text=encoder.text(scene.caption()),
        given=encoder.latents(_grey(frames, made))[:, 1:],
        regions={EDITED: made, "lips": mouth_cells(mouth_boxes(scene, motion)[0], SIZE // 8)[1:]},
    )


def _grey(frames: Image, made: torch.Tensor) -> Image:
    """Frames as they are given of a clip that is edited."""
    from talkingdit.autoencoders.streaming import to_video

    return to_frames(grey_out(to_video(frames), torch.cat([torch.zeros_like(made[:1]), made])))


# ---- Generation ------------------------------------------------------------------------------------------------------


class Raw(SkyReelsAudioPipeline):
    """Shows what the model makes of all that it sees."""

    def composed(self, edit: Any, video: torch.Tensor, begin: int) -> torch.Tensor:
        return video


def pipeline(model: Path, kind: type[SkyReelsAudioPipeline] = SkyReelsAudioPipeline) -> SkyReelsAudioPipeline:
    """A trained model with the parts of the shipped one."""
    parts, settings = shipped(), SkyReelsAudioSettings.load(model / "pipeline.json")
    encoders = (parts.text_encoder, None, settings, model, DrawnSpeech(fps=FPS))
    return kind(WanI2VCheckpoint(load(model), parts.vae, *encoders))


def speech(model: Path, seconds: float, budget: Budget, but: str = "") -> list[FloatArray]:
    """What is spoken in the cases of an evaluation, by speakers that no clip has; not in the language `but`."""
    return drawn_voices.held_out(model.parent.parent, budget, seconds, budget.cases, but)


def options_of(row: Row, seed: int, **more: Any) -> Options:
    chosen = {"guidance": "1", "audio_guidance": "2", **row.options, **more}
    return Options(seed=seed, **chosen)


def animate(made: SkyReelsAudioPipeline, row: Row, said: FloatArray, case: int) -> tuple[Image, FloatArray, Scene]:
    """A held-out character speaks; its frames, and the true opening of the mouth."""
    scene, _ = held_out_scene(3000 + case)
    job = Job(image=Path("drawn.png"), audio=Path("drawn.wav"), output=Path("drawn.mp4"), prompt=scene.caption())
    inputs = Inputs(job, still(scene, np.random.default_rng(case)), said)
    found = outline(inputs, made.settings, options_of(row, case))
    conditions = made.encode(inputs, found)
    clips = generate_clips(made, conditions, found.clips)
    frames = np.concatenate([to_frames(clip.frames) for clip in clips])
    return frames, visemes_from_audio(said, FPS).opening[: len(frames)], scene


def sync(frames: Image, opening: FloatArray) -> tuple[float, int]:
    """Correlation of the mouth with a voice, and the lag in frames at which it is highest."""
    count = min(len(frames), len(opening))
    height = measure_height(frames[:count])
    by_lag = {lag: _correlation(np.roll(height, -lag)[4:-4], opening[4 : count - 4]) for lag in range(-4, 5)}
    return by_lag[0], max(by_lag, key=lambda lag: by_lag[lag])


def _correlation(a: FloatArray, b: FloatArray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def psnr(a: Image, b: Image, where: np.ndarray) -> float:
    error = np.square(a.astype(np.float64) - b)[where].mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def seconds_of(budget: Budget) -> float:
    return 1.5 if budget.quick else 6.0


# ---- Claims ----------------------------------------------------------------------------------------------------------


def speaks(row: Row, model: Path, budget: Budget) -> Measured:
    made, found = pipeline(model), []
    for case, said in enumerate(speech(model, seconds_of(budget), budget)):
        frames, opening, scene = animate(made, row, said, case)
        r, lag = sync(frames, opening)
        reading = probe(frames)
        truth = still(scene, np.random.default_rng(case))
        edge = np.s_[:, : SIZE // 4, : SIZE // 12]
        off = np.abs(frames[edge].astype(float) - truth[edge[1:]]).mean() / 255
        found.append((r, abs(lag), reading.identity_share(0, scene.characters[0]), 1 - off))
    names = ("sync", "lag", "identity", "background")
    return dict(zip(names, map(float, np.mean(found, axis=0)), strict=True))


def seams(row: Row, model: Path, budget: Budget) -> Measured:
    """Change from frame to frame over what windows share, in changes elsewhere."""
    made, ratios = pipeline(model), []
    for case, said in enumerate(speech(model, max(4.0, seconds_of(budget)), budget)):
        frames, _, _ = animate(made, row, said, case)
        change = np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
        window, overlap = made.settings.chunk_latents, 1 if row.options["fusion"] == "none" else made.settings.overlap
        met = np.zeros(len(change), bool)
        for begin in range(window - overlap, len(change) // 4, window - overlap):
            met[max(0, 4 * begin - 4) : 4 * (begin + overlap)] = True
        if met.any() and not met.all():
            ratios.append(change[met].max() / change[~met].max())
    return {"seam_change": float(np.mean(ratios)) if ratios else 0.0}


def dub(
    made: SkyReelsAudioPipeline, row: Row, budget: Budget, case: int, said: FloatArray, folder: Path
) -> tuple[Image, Image, FloatArray]:
    """A drawn video that spoke the shipped recording speaks something else: both, and the old opening."""
    scene, _ = held_out_scene(4000 + case)
    count = int(seconds_of(budget) * FPS)
    old = visemes_from_audio(shipped_voice()[0], FPS)
    opening, width = (np.asarray(values[:count], np.float32) for values in (old.opening, old.width))
    drawn = render(scene, opening[None], width[None], [Motion.random(np.random.default_rng(case), count)], SIZE)
    with VideoWriter(folder / "in.mp4", FPS, (SIZE, SIZE), crf=4) as writer:
        writer.write(drawn)
    soundfile.write(folder / "new.wav", said, SPEECH_RATE)
    video = folder / "in.mp4"
    job = Job(image=video, audio=folder / "new.wav", output=folder / "out.mp4", prompt=scene.caption())
    inputs = Inputs(job, next(open_edited(video).read(0, 1)), said)
    mask = ",".join(map(str, BOX))
    found = outline(inputs, made.settings, options_of(row, case, video=video, mask=mask))
    before = np.stack(list(open_edited(video).read()))
    if isinstance(made, Raw):
        conditions = made.encode(inputs, found)
        after = np.concatenate([to_frames(clip.frames) for clip in generate_clips(made, conditions, found.clips)])
    else:
        make_video(inputs, found, made)
        after = np.stack(list(open_edited(folder / "out.mp4").read()))
    return before, after, opening


def edits(
    row: Row, model: Path, budget: Budget, kind: type[SkyReelsAudioPipeline], said: Sequence[FloatArray]
) -> Measured:
    """Videos that say something else: sync to the new and to the old voice, and how well the rest is kept."""
    made, found = pipeline(model, kind), []
    outside = np.ones((SIZE, SIZE, 3), bool)
    outside[BOX[1] : BOX[3], BOX[0] : BOX[2]] = False
    for case, samples in enumerate(said):
        with tempfile.TemporaryDirectory() as folder:
            before, after, old = dub(made, row, budget, case, samples, Path(folder))
        new = visemes_from_audio(samples, FPS).opening[: len(after)]
        kept = psnr(before, after, np.broadcast_to(outside, before.shape))
        found.append((sync(after, new)[0], sync(after, old)[0], kept))
    names = ("sync_new", "sync_old", "psnr_outside")
    return dict(zip(names, map(float, np.mean(found, axis=0)), strict=True))


def hybrid(row: Row, model: Path, budget: Budget) -> Measured:
    return edits(row, model, budget, Raw, speech(model, seconds_of(budget), budget))


def dubbing(row: Row, model: Path, budget: Budget) -> Measured:
    """The shipped speaker, an Italian whom no clip has, says something else, or a speaker of another language does."""
    seconds = seconds_of(budget)
    if row.name == "other_language":
        said = speech(model, seconds, budget, but="it")
    else:
        said = [shipped_voice()[1][: int(seconds * SPEECH_RATE)]] * budget.cases
    return edits(row, model, budget, SkyReelsAudioPipeline, said)


STUDY = Study(
    name=NAME,
    config="skyreels_drawn.toml",
    rows=(
        Row("full"),
        Row("no_rope", {"model.settings.audio_rope": False}),
        Row("no_mask_loss", {"objective.gate": 0.0}),
        Row("guidance_1", options={"audio_guidance": "1"}, model="full"),
        Row("guidance_3", options={"audio_guidance": "3"}, model="full"),
        Row("guidance_4.5", options={"audio_guidance": "4.5"}, model="full"),
        Row("fusion_none", options={"fusion": "none"}, model="full"),
        Row("fusion_one", options={"fusion": "one"}, model="full"),
        Row("fusion_both", options={"fusion": "both"}, model="full"),
        Row("full_video", model="full"),
        Row("hybrid", options={"video_steps": 4}, model="full"),
        Row("new_voice", model="full"),
        Row("other_language", model="full"),
    ),
    claims=(
        Claim("audio_rope", "rotary time aligns voice and mouth", ("full", "no_rope"), speaks, {"sync": True}),
        Claim(
            "audio_guidance",
            "more audio guidance: sync up, picture quality slightly down",
            ("guidance_1", "guidance_3", "guidance_4.5"),
            speaks,
            {"sync": True, "identity": True, "background": True},
        ),
        Claim(
            "facial_mask_loss",
            "a loss of the lips alone, now and then: better sync at equal steps",
            ("full", "no_mask_loss"),
            speaks,
            {"sync": True},
        ),
        Claim(
            "bidirectional_latent_fusion",
            "windows meet without a seam",
            ("fusion_both", "fusion_one", "fusion_none"),
            seams,
            {"seam_change": False},
        ),
        Claim(
            "hybrid_inference",
            "the first frame alone in late steps: better sync, the rest kept less well",
            ("full_video", "hybrid"),
            hybrid,
            {"sync_new": True, "psnr_outside": True},
        ),
        Claim(
            "dubbing",
            "the mouth follows the new voice and not the old one, all else stays",
            ("new_voice", "other_language"),
            dubbing,
            {"sync_new": True, "sync_old": False, "psnr_outside": True},
        ),
    ),
    prepare=prepare,
)
