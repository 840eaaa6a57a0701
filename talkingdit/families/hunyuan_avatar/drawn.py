# SPDX-License-Identifier: Apache-2.0
"""The drawn world as a source of clips with several people, each with a voice or silent, and a mood that is told.

Videos are drawn and encoded whole. A clip is a window of one that begins anywhere and may wrap around the end, as the
windows of generation do (section 3.5, Algorithm 1): a model that saw only clips encoded by themselves would begin
every window like a video. There are one to three people. Some talk, each with a voice; of those who do not, some hear
silence and some have no voice at all. In some videos a picture of somebody else tells the mood of all, or two
pictures do, one after the other; in the others people keep the mood of the portrait.

Videos are drawn once, in parts, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from talkingdit.atomic import write_whole
from talkingdit.autoencoders.codec import codec, still
from talkingdit.autoencoders.latents import FRAMES_PER_LATENT
from talkingdit.autoencoders.streaming import to_video
from talkingdit.autoencoders.wan import load_vae
from talkingdit.checkpoints.saving import save_tensors
from talkingdit.data.sample import ClipRequest, Sample, Shape
from talkingdit.encoders.log_mel import SpeechFeatures
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.samples import EMOTION, NOT_OF_THE_CLIP, STILL
from talkingdit.families.hunyuan_avatar.windows import still_places
from talkingdit.families.puppet.drawn import Voice, mouth_cells, read_voices
from talkingdit.families.training import TrainRun
from talkingdit.lock import RunLock
from talkingdit.nn.bfloat16 import bfloat16_products
from talkingdit.puppets.render import mouth_boxes
from talkingdit.puppets.scenes import Play, face_boxes, plain_caption, portrait_of
from talkingdit.puppets.world import EXPRESSIONS, Character, Motion, Scene

PEOPLE = 3  # places for voices in a clip; those without a person have no room
SHARES = (0.3, 0.5, 0.2)  # of scenes with one, two and three people
TALKS, HEARS_SILENCE = 0.6, 0.4  # chances: that somebody talks, that who does not hears silence
TOLD, CHANGES = 0.8, 0.8  # chances: that a mood is told, that it changes in the video
CLIPS = 2  # lengths of a clip in a video
PART = 50  # videos in a file
SPATIAL = 8  # pixels per latent pixel


@dataclass(frozen=True)
class DrawnScenes:
    """What is drawn, and where it and what it is made of lie."""

    voices: Path  # made by `python -m training.voices`
    vae: Path
    cache: Path
    videos: int
    latents: int  # of a clip
    size: int  # side of a frame, pixels
    fps: int

    @staticmethod
    def of(run: TrainRun) -> DrawnScenes:
        """Those of a run: as many as it has videos, long or short."""
        data = run.data
        videos = data["long_videos"] + data["short_videos"]
        return DrawnScenes(
            data["voices"], data["vae"], data["cache"], videos, run.clip_latents, data["size"], data["fps"]
        )

    @property
    def length(self) -> int:
        """Latents of a video."""
        return CLIPS * self.latents

    @property
    def frames(self) -> int:
        """Of a video."""
        return 4 * self.length - 3

    @property
    def parts(self) -> int:
        return -(-self.videos // PART)

    def part(self, number: int) -> Path:
        return self.cache / f"part-{number:05d}.safetensors"


@dataclass(frozen=True)
class DrawnVideo:
    """One video before it is encoded.

    Attributes:
        play: what happens.
        portrait: [S, S, 3].
        mood_pictures: [S, S, 3] of somebody else, two, which may be the same one; None where no mood is told.
        change: latent from which the second of them counts.
        columns: [PEOPLE, blocks, window * channels, 4 N] of voices, of N latents.
        masks: [PEOPLE, h, w] of their faces; zeros where there is nobody, or nobody who hears.
    """

    play: Play
    portrait: np.ndarray
    mood_pictures: tuple[np.ndarray, np.ndarray] | None
    change: int
    columns: Tensor
    masks: Tensor


def draw_video(rng: np.random.Generator, voices: list[Voice], scenes: DrawnScenes) -> DrawnVideo:
    """A video for training."""
    people = int(rng.choice([1, 2, 3], p=SHARES))
    scene = Scene.random(rng, "train", people)
    frames = scenes.frames
    openings, widths = np.zeros((people, frames), np.float32), np.full((people, frames), 0.5, np.float32)
    silence = SpeechFeatures(fps=scenes.fps)(torch.zeros(1600), frames + NOT_OF_THE_CLIP)
    columns = torch.zeros(PEOPLE, *silence.shape)
    masks = torch.zeros(PEOPLE, scenes.size // SPATIAL, scenes.size // SPATIAL)
    for i, box in enumerate(face_boxes(people)):
        if rng.random() < TALKS:
            voice = _long_enough(rng, voices, frames + NOT_OF_THE_CLIP)
            start = int(rng.integers(len(voice.opening) - frames - NOT_OF_THE_CLIP + 1)) + NOT_OF_THE_CLIP
            span = slice(start, start + frames)
            openings[i], widths[i] = voice.opening[span], voice.width[span]
            columns[i] = voice.features[..., start - NOT_OF_THE_CLIP : start + frames]
        elif rng.random() < HEARS_SILENCE:
            columns[i] = silence
        else:
            continue
        masks[i] = box_mask(box, masks.shape[1])
    mood_pictures, moods, change = None, None, scenes.length
    if rng.random() < TOLD:
        told = [str(mood) for mood in rng.choice(EXPRESSIONS, 2, replace=False)]
        changes = rng.random() < CHANGES
        if changes:
            change = int(rng.integers(1, scenes.length))
        first = max(0, FRAMES_PER_LATENT * (change - 1) + 1)  # frames of the latents in front of it
        moods = told[:1] * first + told[1:] * (frames - first)
        one, two = (_mood_picture(rng, mood, scene.background, scenes.size) for mood in told)
        mood_pictures = (one, two if changes else one)
    motion = [Motion.random(rng, frames, scenes.fps) for _ in range(people)]
    play = Play(scene, openings, widths, motion, moods)
    return DrawnVideo(play, portrait_of(scene, scenes.size), mood_pictures, change, columns, masks)


def _mood_picture(rng: np.random.Generator, mood: str, background: str, size: int) -> np.ndarray:
    return portrait_of(Scene((Character.random(rng, "train"),), (mood,), background=background), size)


def _long_enough(rng: np.random.Generator, voices: list[Voice], frames: int) -> Voice:
    fitting = [voice for voice in voices if len(voice.opening) >= frames]
    if not fitting:
        raise UserError(f"data.voices: expected a recording of {frames} frames at least, got none.")
    return fitting[rng.integers(len(fitting))]


def box_mask(box: tuple[float, float, float, float], cells: int) -> Tensor:
    """A box in frame sizes as a mask [cells, cells] of latent pixels, bright where half of one is inside."""
    x0, y0, x1, y1 = (round(side * cells) for side in box)
    mask = torch.zeros(cells, cells)
    mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = 1
    return mask


@torch.no_grad()
def precompute(scenes: DrawnScenes, seed: int = 0) -> None:
    """Draw and encode all videos into the cache, those that are not there yet for these settings.

    Raises:
        UserError: there are no voices or no autoencoder, or another run draws into the cache.
    """
    weights = scenes.vae / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise UserError(f"data.vae: expected the folder of an autoencoder, got {scenes.vae}.")
    wanted = {
        "latents": scenes.length,
        "size": scenes.size,
        "fps": scenes.fps,
        "seed": seed,
        "vae": weights.stat().st_size,
        "drawing": 5,  # what is drawn, and what is kept of it
    }
    stamp = scenes.cache / "stamp.json"
    scenes.cache.mkdir(parents=True, exist_ok=True)

    def there() -> bool:
        return stamp.exists() and json.loads(stamp.read_text()) == wanted

    def lacking() -> list[int]:
        return [number for number in range(scenes.parts) if not scenes.part(number).exists()]

    if there() and not lacking():
        return
    with RunLock(scenes.cache / ".lock", scenes.cache, "drawing of training videos"):
        if not there():
            for old in scenes.cache.glob("part-*.safetensors"):
                old.unlink()
            write_whole(stamp, json.dumps(wanted).encode())
        _fill(scenes, seed, lacking())


def _fill(scenes: DrawnScenes, seed: int, missing: Sequence[int]) -> None:
    """Draw and encode parts of the cache."""
    model = load_vae(scenes.vae)
    voices = read_voices(scenes.voices, "train", scenes.fps)
    for number in tqdm(missing, desc="drawing scenes"):
        tensors: dict[str, list[Tensor]] = {}
        captions = []
        for index in range(number * PART, min((number + 1) * PART, scenes.videos)):
            drawn = draw_video(np.random.default_rng((seed, scenes.length, index)), voices, scenes)
            for name, tensor in encode_drawn(model, drawn, scenes).items():
                tensors.setdefault(name, []).append(tensor)
            captions.append(plain_caption(drawn.play.scene))
        stacked = {name: torch.stack(rows) for name, rows in tensors.items()}
        save_tensors(stacked, scenes.part(number), {"captions": json.dumps(captions)})


@torch.no_grad()
def encode_drawn(model: Any, drawn: DrawnVideo, scenes: DrawnScenes) -> Mapping[str, Tensor]:
    """The tensors of a video as they are kept."""
    one = codec(model)

    def encoded(video: Tensor) -> Tensor:
        with bfloat16_products():
            return one.encode(video)[0].to(torch.bfloat16)

    cells = scenes.size // SPATIAL
    boxes = mouth_boxes(drawn.play.scene, drawn.play.motion)
    mouths = torch.stack([mouth_cells(each, cells) for each in boxes]).any(0)
    faces = torch.stack([box_mask(box, cells) for box in face_boxes(len(drawn.play.scene.characters))]).any(0)
    moods = drawn.mood_pictures or (drawn.portrait, drawn.portrait)
    return {
        "latents": encoded(to_video(drawn.play.draw(scenes.size))),
        "still": encoded(still(to_video(drawn.portrait[None]), scenes.latents)),
        "emotion": torch.cat([encoded(to_video(mood[None])) for mood in moods], dim=1),
        "told": torch.tensor(drawn.mood_pictures is not None),
        "change": torch.tensor(drawn.change),
        "audio": drawn.columns.to(torch.float16),
        "masks": drawn.masks.to(torch.float16),
        "mouths": mouths,
        "faces": faces,
    }


class Scenes:
    """A source (`talkingdit.data.sample.Source`) of clips of the videos in a cache.

    Args:
        scenes: what `precompute` has drawn.
        name: of the source.

    Raises:
        ValueError: a part is missing.
    """

    cuts = False  # every clip is one

    def __init__(self, scenes: DrawnScenes, name: str = "scenes") -> None:
        self.scenes, self.name = scenes, name
        missing = [number for number in range(scenes.parts) if not scenes.part(number).exists()]
        if missing:
            raise ValueError(f"scenes: {scenes.part(missing[0])} is missing; the videos are not complete")
        self._files: dict[int, Any] = {}
        self._captions: dict[int, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # every process opens them itself

    def __len__(self) -> int:
        return self.scenes.videos

    def group(self, index: int) -> str:
        """Every clip is a video of its own."""
        return str(index)

    def shape(self, index: int) -> Shape:
        cells = self.scenes.size // SPATIAL
        return Shape(self.scenes.latents, cells, cells, fps=float(self.scenes.fps))

    def sample(self, index: int, rng: np.random.Generator, clip: ClipRequest) -> Sample:
        """A clip that begins anywhere in the video and goes on at its beginning behind its end.

        Raises:
            ValueError: another length or size is asked for.
        """
        cells = self.scenes.size // SPATIAL
        wanted = (clip.frames or self.scenes.latents, clip.height or cells, clip.width or cells)
        if wanted != (self.scenes.latents, cells, cells):
            raise ValueError(
                f"scenes: clips have {self.scenes.latents} x {cells} x {cells} latents, asked for {wanted}"
            )
        part, row = divmod(index, PART)
        if part not in self._files:
            self._files[part] = safe_open(self.scenes.part(part), "pt")
            self._captions[part] = json.loads(self._files[part].metadata()["captions"])
        file = self._files[part]

        def read(name: str) -> Tensor:
            return file.get_slice(name)[row : row + 1][0].float()

        latents = (int(rng.integers(self.scenes.length)) + torch.arange(self.scenes.latents)) % self.scenes.length
        columns = (FRAMES_PER_LATENT * latents[:, None] + torch.arange(FRAMES_PER_LATENT)).reshape(-1)
        still_latents, masks, audio = read("still"), read("masks"), read("audio")[..., columns]
        names = [f"voice {i}" for i in range(PEOPLE)]
        regions = {name: masks[i].expand(self.scenes.latents, -1, -1) for i, name in enumerate(names)}
        outside = {STILL: still_latents[:, still_places(latents, still_latents.shape[1])]}
        if bool(read("told")):
            outside[EMOTION] = read("emotion")
            second = (latents >= read("change")).float()[:, None, None].expand_as(regions[names[0]])
            regions |= {f"{EMOTION} 0": 1 - second, f"{EMOTION} 1": second}
        return Sample(
            key=f"scenes/{index}",
            source=self.name,
            latents=read("latents")[:, latents],
            voices={name: audio[i] for i, name in enumerate(names)},
            caption=self._captions[part][row],
            reference=outside[STILL][:, :1],
            regions={
                **regions,
                "faces": read("faces").expand(self.scenes.latents, -1, -1),
                "mouth": read("mouths")[latents],
            },
            outside=outside,
        )
