# SPDX-License-Identifier: Apache-2.0
"""Clips of the drawn world with content anchors, for models that take them: drawn, encoded, kept as shards.

A video is some shots of one character. A clip is a part of one: the frame before it, its frames, its sound. Words say
all of a scene, or nothing of looks (`Telling`). In some clips the character is seen from elsewhere in the frame before;
where words are silent too, looks can only be known from anchors. Anchors of every kind are there twice: a frame of the
clip where it shows the kind, and one of another shot, with another background, mouth and mood. Expressions are cut
around the head and have a size of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from bench import record
from talkingdit.autoencoders.streaming import encode, to_video
from talkingdit.data.sample import Sample
from talkingdit.data.shards import ShardWriter
from talkingdit.families.puppet.drawn import Voice
from talkingdit.nn.bfloat16 import bfloat16_products
from talkingdit.puppets.render import Image, render
from talkingdit.puppets.world import BACKGROUND, EXPRESSIONS, VIEWPOINTS, Character, FloatArray, Motion, Scene

SIZE, FPS = 96, 16
HEAD_BOX, HEAD_SIDE = (0.18, 0.08, 0.82, 0.72), 64  # part of a frame that an expression shows, and its side in pixels
KIND_OF = {name: {"surprised": "surprise"}.get(name, name) for name in EXPRESSIONS}  # as the paper calls them


@dataclass(frozen=True)
class AnchorClip:
    """What one clip shows."""

    scene: Scene
    before: Scene  # of the frame before it
    frames: Image  # [1 + n, S, S, 3], the frame before it in front
    opening: FloatArray  # [1 + n] of the mouth
    start: int  # of its sound in the voice, in frames


def silent_words(scene: Scene) -> str:
    """What is said of a scene where anchors show the looks: mood, side and whether the background moves."""
    backdrop = "moving" if scene.moving_background else "still"
    return f"a person, {scene.expressions[0]}, {scene.viewpoint} view, talking, {backdrop} background"


@dataclass(frozen=True)
class Telling:
    """What a model can know of a clip without anchors.

    Args:
        words: of a scene.
        turned: share of clips whose frame before shows another side.
    """

    words: Callable[[Scene], str]
    turned: float


TOLD, SILENT = Telling(Scene.caption, 0.5), Telling(silent_words, 0.7)


def talking(scene: Scene, opening: FloatArray, width: FloatArray, rng: np.random.Generator) -> Image:
    """Frames [F, S, S, 3] of one person who moves and speaks."""
    return render(scene, opening[None], width[None], [Motion.random(rng, len(opening))], SIZE)


def still(scene: Scene, rng: np.random.Generator) -> Image:
    """A frame [S, S, 3] with the mouth anyhow."""
    mouth = rng.random((2, 1)).astype(np.float32)
    return talking(scene, mouth[0], mouth[1], rng)[0]


def head_of(frame: Image) -> Image:
    """The head in a frame, [HEAD_SIDE, HEAD_SIDE, 3]."""
    x0, y0, x1, y1 = (round(side * frame.shape[0]) for side in HEAD_BOX)
    return cv2.resize(frame[y0:y1, x0:x1], (HEAD_SIDE, HEAD_SIDE), interpolation=cv2.INTER_AREA)


def other_shot(scene: Scene, rng: np.random.Generator, **changes: Any) -> Scene:
    """The same person elsewhere and in another mood, but for what is said."""
    free = {
        "background": str(rng.choice([name for name in BACKGROUND if name != scene.background])),
        "moving_background": False,
        "expressions": (str(rng.choice(EXPRESSIONS)),),
    }
    return replace(scene, **{**free, **changes})


def draw_clip(
    rng: np.random.Generator, voice: Any, latents: int, split: Any = "train", turned: float = TOLD.turned
) -> AnchorClip:
    """A clip of a random character.

    Args:
        voice: its mouth by frames, as `Voice` or `Visemes` have it.
        latents: of the clip, four frames each.
        split: of characters.
        turned: see `Telling`.
    """
    count = 4 * latents
    scene = Scene.random(rng, split, viewpoint=VIEWPOINTS[int(rng.choice(4, p=(0.55, 0.15, 0.15, 0.15)))])
    before = scene
    if rng.random() < turned:
        before = scene.with_viewpoint(str(rng.choice([view for view in VIEWPOINTS if view != scene.viewpoint])))  # type: ignore[arg-type]
    start = int(rng.integers(len(voice.opening) - count))
    opening = np.concatenate([[rng.random() * (rng.random() < 0.3)], voice.opening[start : start + count]])
    width = np.concatenate([[0.5], voice.width[start : start + count]])
    frames = talking(scene, opening.astype(np.float32), width.astype(np.float32), rng)
    if before != scene:
        frames[0] = talking(before, opening[:1].astype(np.float32), width[:1].astype(np.float32), rng)[0]
    return AnchorClip(scene, before, frames, opening.astype(np.float32), start)


def anchors_of(clip: AnchorClip, rng: np.random.Generator) -> dict[str, list[tuple[Image, bool]]]:
    """Frames by kind, and whether the clip has them."""
    inside = clip.frames[1 + int(rng.integers(len(clip.frames) - 1))]
    scene = clip.scene
    found = {"global": [(still(clip.before, rng), False), (clip.frames[0], True)]}
    for view in VIEWPOINTS:
        shot = still(other_shot(scene, rng, viewpoint=view), rng)
        found[view] = [(shot, False)] + ([(inside, True)] if view == scene.viewpoint else [])
    for mood in EXPRESSIONS:
        shot = still(other_shot(scene, rng, viewpoint="front", expressions=(mood,)), rng)
        same = scene.viewpoint == "front" and mood == scene.expressions[0]
        found[KIND_OF[mood]] = [(head_of(shot), False)] + ([(head_of(inside), True)] if same else [])
    return found


@dataclass(frozen=True)
class Encoder:
    """The frozen networks of the model that ships.

    Args:
        vae, text_encoder: its parts.
    """

    vae: Any
    text_encoder: Any

    @torch.no_grad()
    def latents(self, frames: Image) -> torch.Tensor:
        """[C, 1 + n, h, w] of frames [1 + 4 n, S, S, 3]."""
        with bfloat16_products():
            return encode(self.vae, to_video(frames))[0].float()

    @torch.no_grad()
    def stills(self, images: list[Image]) -> torch.Tensor:
        """[C, n, h, w] of images [S, S, 3] of one size, each encoded alone."""
        video = torch.cat([to_video(image[None]) for image in images])
        with bfloat16_products():
            return encode(self.vae, video)[:, :, 0].transpose(0, 1).float()

    @torch.no_grad()
    def text(self, caption: str) -> torch.Tensor:
        """[L, text_dim]."""
        return self.text_encoder.encode([caption]).features[0].float()


def write_clips(
    folder: Path,
    encoder: Encoder,
    read: Callable[[], Sequence[Voice]],
    count: int,
    latents: int,
    seed: int = 0,
    telling: Telling = TOLD,
) -> None:
    """Draw and encode so many clips; what an earlier call has written stays.

    Args:
        folder: of the shards.
        read: gives the voices to train on, of which every clip has one.
        latents: per clip.
        telling: what words say, and how often the frame before is of another side.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.txt"
    first = int(done.read_text()) if done.is_file() else 0
    voices = read() if first < count else []
    part = 50  # clips of a shard: what an interrupt can cost
    for begin in tqdm(range(first, count, part), desc="drawing clips", disable=first >= count):
        writer = ShardWriter(folder, begin // part, 1 << 30)
        for index in range(begin, min(begin + part, count)):
            rng = np.random.default_rng((seed, index))
            voice = voices[int(rng.integers(len(voices)))]
            clip = draw_clip(rng, voice, latents, turned=telling.turned)
            caption = telling.words(clip.scene)
            writer.add(_sample(index, clip, caption, encoder, voice.features, rng), {"fps": FPS}, torch.bfloat16)
        writer.finish()
        record.write(done, str(min(begin + part, count)))


def _sample(
    index: int, clip: AnchorClip, caption: str, encoder: Encoder, features: torch.Tensor, rng: np.random.Generator
) -> Sample:
    whole = encoder.latents(clip.frames)
    anchors = anchors_of(clip, rng)
    outside: dict[str, torch.Tensor] = {}
    for side in {frames[0][0].shape for frames in anchors.values()}:  # those of a size at once
        kinds = {kind: frames for kind, frames in anchors.items() if frames[0][0].shape == side}
        whole_size = encoder.stills([image for frames in kinds.values() for image, _ in frames])
        parts = whole_size.split([len(frames) for frames in kinds.values()], dim=1)
        outside |= {kind: part.contiguous() for kind, part in zip(kinds, parts, strict=True)}
    return Sample(
        key=f"drawn-{index:06d}b",
        source="drawn",
        latents=whole[:, 1:],
        reference=whole[:, :1],
        audio=features[:, :, clip.start : clip.start + len(clip.frames) - 1],
        caption=caption,
        text=encoder.text(caption),
        outside=outside,
        inside={kind: torch.tensor([float(own) for _, own in frames]) for kind, frames in anchors.items()},
    )


def held_out_scene(seed: int, viewpoint: Any = "front") -> tuple[Scene, Character]:
    """A scene of a character that no clip shows."""
    scene = Scene.random(np.random.default_rng(seed), "held_out", viewpoint=viewpoint)
    return scene, scene.characters[0]
