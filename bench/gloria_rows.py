# SPDX-License-Identifier: Apache-2.0
"""The ablations of Gloria (arXiv:2603.29931, table 3 and figures 7 and 8) on the drawn world, see `bench.ablations`.

anchors hold identity        a long video from a portrait; who and what stands there at its start and at its end

What anchors show that words do not say is asked in `bench.gloria_silent`. The row "right_videos" of each claim says
what its measures find in videos that are drawn as the words ask.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import drawn_voices
from bench.ablations import Budget, Claim, Measured, Row, Study
from bench.drawn_anchors import FPS, SIZE, TOLD, Encoder, Telling, held_out_scene, still, talking, write_clips
from talkingdit.autoencoders.streaming import StreamingDecoder, to_frames
from talkingdit.checkpoints.saving import save_tensors
from talkingdit.encoders.log_mel import SpeechFeatures, normalise_loudness
from talkingdit.families.gloria.checkpoint import GloriaSettings
from talkingdit.families.gloria.load import load
from talkingdit.families.gloria.options import Options
from talkingdit.families.gloria.outline import AnchorImage, Details, chunk_plan
from talkingdit.families.gloria.pipeline import GloriaPipeline
from talkingdit.families.wan_i2v.checkpoint import WanI2VCheckpoint
from talkingdit.families.wan_i2v.outline import Sampling, latents_of_frames
from talkingdit.media.files import SPEECH_RATE, read_audio
from talkingdit.models import default_checkpoint, load_checkpoint
from talkingdit.pipelines.long_video import generate_clips
from talkingdit.puppets.probe import probe
from talkingdit.puppets.render import Image
from talkingdit.puppets.visemes import visemes_from_audio
from talkingdit.puppets.world import Scene

NAME = "gloria"
CLIP_LATENTS = 8
TRUNK = ("patch_embedding.", "text_embedding.", "time_embedding.", "time_projection.", "blocks.", "head.")


@functools.lru_cache(maxsize=1)
def shipped() -> Any:
    """The model that ships: its autoencoder and prompt encoder are used, its transformer is begun from."""
    return load_checkpoint(default_checkpoint())


def voice(frames: int) -> np.ndarray:
    """What is spoken in a video of so many frames, [samples] at 16 kHz; the recording again where it is shorter."""
    said = normalise_loudness(read_audio(default_checkpoint().parent / "voice.flac", SPEECH_RATE))
    samples = frames * SPEECH_RATE // FPS
    return np.tile(said, -(-samples // len(said)))[:samples]


def prepare(name: str, telling: Telling, folder: Path, budget: Budget) -> None:
    """The trunk that rows of the study `name` begin from, as a video model; and their clips."""
    start = folder / f"{name}_start"
    if not (start / "config.json").is_file():
        start.mkdir(parents=True, exist_ok=True)
        state = shipped().transformer.state_dict()
        trunk = {name: value for name, value in state.items() if name.startswith(TRUNK)}
        save_tensors(trunk, start / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        (start / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v"}))
    encoder = Encoder(shipped().vae, shipped().text_encoder)
    clips, seed = folder / f"{name}_clips", budget.seed
    voices = functools.partial(drawn_voices.trained, folder, budget, FPS)
    write_clips(clips, encoder, voices, budget.clips, CLIP_LATENTS, seed, telling)


# ---- Videos ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoCase:
    """What a video is made of.

    Args:
        first: its first frame, [S, S, 3].
        scene: what is asked for.
        caption: in these words.
        anchors: given with it.
        frames: how many.
        seed: of its noise.
    """

    first: Image
    scene: Scene
    caption: str
    anchors: tuple[AnchorImage, ...]
    frames: int
    seed: int


def pipeline(model: Path) -> GloriaPipeline:
    """A trained model with the parts of the shipped one."""
    parts, settings = shipped(), GloriaSettings.load(model / "pipeline.json")
    speech: Any = SpeechFeatures(fps=FPS)
    return GloriaPipeline(WanI2VCheckpoint(load(model), parts.vae, parts.text_encoder, None, settings, model, speech))


def generate(made: GloriaPipeline, ask: VideoCase) -> Iterator[Image]:
    """Frames of a video, chunk by chunk."""
    sampling = Sampling.of(Options(seed=ask.seed, guidance=1.0, audio_guidance=2.0), made.settings)
    plan = chunk_plan(sampling.chunk_latents, made.settings.prefix_latents)
    latents = latents_of_frames(ask.frames)
    details = Details(sampling, Options(), latents, ask.anchors, plan)
    features = SpeechFeatures(fps=FPS)(voice(ask.frames), 1 + 4 * (latents - 1))
    conditions = made.video(ask.first, ask.caption, details, features, frames=ask.frames)
    for clip in generate_clips(made, conditions, len(list(plan.stages(latents)))):
        yield to_frames(clip.frames)


def right_video(ask: VideoCase) -> Image:
    """Frames [F, S, S, 3] that are drawn as the words ask, as the autoencoder gives them back."""
    mouth = visemes_from_audio(voice(ask.frames), FPS, ask.frames)
    return coded(talking(ask.scene, mouth.opening, mouth.width, np.random.default_rng([8, ask.seed])))


def coded(frames: Image) -> Image:
    """Frames [F, S, S, 3] through the autoencoder of all rows, some at a time so that any length fits into memory."""
    encoder, part = Encoder(shipped().vae, shipped().text_encoder), 4 * CLIP_LATENTS + 1
    seen = []
    for begin in range(0, len(frames), part):
        piece = frames[begin : begin + part]
        whole = np.concatenate([piece, np.repeat(piece[-1:], -(len(piece) - 1) % 4, axis=0)])  # 1 + 4 n
        seen.append(to_frames(StreamingDecoder(shipped().vae)(encoder.latents(whole)[None]))[: len(piece)])
    return np.concatenate(seen)


def maker(row: Row, model: Path) -> Callable[[VideoCase], Image]:
    """How a row makes videos [F, S, S, 3]; that which trains nothing draws them."""
    if not row.trained:
        return right_video
    made = pipeline(model)
    return lambda ask: np.concatenate(list(generate(made, ask)))


def global_anchor(first: Image, row: Row) -> tuple[AnchorImage, ...]:
    return () if row.options.get("no_global") else (AnchorImage("global", "global", first),)


# ---- Claims ----------------------------------------------------------------------------------------------------------


def backdrop(frames: Image) -> np.ndarray:
    """Median colour of the upper corners, [F, 3]."""
    edge, high = round(0.08 * SIZE), round(0.3 * SIZE)
    corners = np.concatenate([frames[:, :high, :edge], frames[:, :high, -edge:]], axis=2)
    return np.median(corners.reshape(len(frames), -1, 3), axis=1)


def hold_identity(row: Row, model: Path, budget: Budget, words: Callable[[Scene], str] = Scene.caption) -> Measured:
    """Share of frames with the right character, and likeness of the background, in the first and the last tenth."""
    make = maker(row, model)
    frames = max(8, round(budget.video_minutes * 60 * FPS))
    found: dict[str, list[float]] = {}
    for case in range(max(1, budget.cases // 4)):
        scene, who = held_out_scene(1000 + case)
        first = still(scene, np.random.default_rng(case))
        video = make(VideoCase(first, scene, words(scene), global_anchor(first, row), frames, budget.seed + case))
        tenth = max(4, len(video) // 10)
        for name, part in (("start", video[:tenth]), ("end", video[-tenth:])):
            found.setdefault(f"identity_{name}", []).append(probe(part).identity_share(0, who))
            away = np.abs(backdrop(part) - backdrop(first[None])).mean() / 255
            found.setdefault(f"background_{name}", []).append(float(1 - away))
    return {name: float(np.mean(values)) for name, values in found.items()}


STUDY = Study(
    name=NAME,
    config="gloria_drawn.toml",
    rows=(
        Row("full"),
        Row("no_global_anchor", {"conditions.anchors.always": []}, {"no_global": True}),
        Row("no_superset", {"conditions.anchors.of": "clip"}),
        Row("right_videos", trained=False),
    ),
    claims=(
        Claim(
            "anchors_hold_identity",
            "a global anchor keeps character and background over minutes",
            ("full", "no_global_anchor", "no_superset", "right_videos"),
            hold_identity,
            {"identity_end": True, "background_end": True},
        ),
    ),
    prepare=functools.partial(prepare, NAME, TOLD),
)
