# SPDX-License-Identifier: Apache-2.0
"""Drawn clips with planted faults, and what is true of each.

Voices are recordings as `python -m training.voices` fetches them. Nothing here knows how faults are found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import soundfile
from numpy.typing import NDArray

from talkingdit.atomic import write_whole
from talkingdit.encoders.log_mel import normalise_loudness
from talkingdit.media.files import SPEECH_RATE, VideoWriter
from talkingdit.puppets.render import render
from talkingdit.puppets.visemes import visemes_from_audio
from talkingdit.puppets.world import BACKGROUND, Motion, Scene

FAULTS = (
    *("none", "no_face", "two_people", "subtitles", "silence", "shifted", "blur", "cut", "two_speakers", "duplicate"),
)
SECONDS, FPS, SIDE = 6.0, 25, 256
SHIFT = 0.24  # seconds of a shifted voice
WORDS = ("SUBSCRIBE NOW", "Episode Twelve", "breaking news", "thank you all", "see you soon")

Frames = NDArray[np.uint8]
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Planted:
    """A clip.

    Args:
        name: of the file, without its ending.
        fault: of `FAULTS`.
        cut: seconds at which its shots change; None without a cut.
        original: name of the clip that it is a copy of.
    """

    name: str
    fault: str
    cut: float | None = None
    original: str = ""


def read_voices(folder: Path) -> dict[str, list[Samples]]:
    """Recordings by speaker, loudness normalised; files `SPEAKER/NUMBER.flac`, of which en and es are one person."""
    voices: dict[str, list[Samples]] = {}
    for file in sorted(folder.glob("*/*.flac")):
        speaker = file.parent.name.rsplit("-", 1)[0]
        known = voices.setdefault(speaker, [])
        if len(known) < 40:
            known.append(normalise_loudness(soundfile.read(file, dtype="float32")[0]))
    return voices


def plant(folder: Path, count: int, voices: dict[str, Sequence[Samples]], seed: int = 0) -> list[Planted]:
    """Draw clips, the same number of each fault; returns what is true of them, also kept as `truth.json`.

    A clip depends on the seed and its number alone, so that a folder with fewer of them, or one whose drawing was
    stopped, is added to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    truth = folder / "truth.json"
    made = [Planted(**row) for row in json.loads(truth.read_text())][:count] if truth.is_file() else []
    for number in range(len(made), count):
        fault = FAULTS[number % len(FAULTS)]
        rng = np.random.default_rng((seed, number))
        name = f"{number:03d}"
        if fault == "duplicate":
            made.append(_copy(folder, name, made[number - number % len(FAULTS)].name))
        else:
            made.append(_draw(folder / f"{name}.mp4", name, fault, voices, rng))
        write_whole(truth, json.dumps([vars(one) for one in made]).encode())
    return made


def _draw(file: Path, name: str, fault: str, voices: dict[str, Sequence[Samples]], rng: np.random.Generator) -> Planted:
    sound = _voice(fault, voices, rng)
    frames = round(SECONDS * FPS)
    people = 2 if fault == "two_people" else 1
    visemes = visemes_from_audio(sound, FPS, frames)
    scene = Scene.random(rng, people=people)
    openings = np.zeros((people, frames), np.float32)
    widths = np.full((people, frames), 0.5, np.float32)
    openings[0], widths[0] = visemes.opening, visemes.width
    motion = [Motion.random(rng, frames, FPS) for _ in range(people)]
    cut = None
    if fault == "no_face" and rng.random() < 0.5:
        pictures = np.empty((frames, SIDE, SIDE, 3), np.uint8)
        pictures[:] = BACKGROUND[scene.background]
        for f in range(frames):
            cv2.circle(pictures[f], (int(SIDE * (0.2 + 0.6 * f / frames)), SIDE // 2), SIDE // 6, (90, 120, 160), -1)
    else:
        scene = scene.with_viewpoint("back") if fault == "no_face" else scene
        pictures = render(scene, openings, widths, motion, SIDE)
    if fault == "cut":
        at = int(rng.integers(frames // 4, 3 * frames // 4))
        other = Scene.random(rng)
        pictures[at:] = render(other, openings, widths, motion, SIDE)[at:]
        cut = at / FPS
    if fault == "blur":
        radius = float(rng.uniform(4, 8))
        pictures = np.stack([cv2.GaussianBlur(frame, (0, 0), radius) for frame in pictures])
    if fault == "subtitles":
        _write_over(pictures, str(rng.choice(WORDS)), rng)
    if fault == "silence":
        sound = np.zeros_like(sound)
    if fault == "shifted":
        samples = round(SHIFT * SPEECH_RATE) * (1 if rng.random() < 0.5 else -1)
        sound = np.roll(sound, samples)
    with VideoWriter(file, FPS, (SIDE, SIDE), audio=sound, rate=SPEECH_RATE) as writer:
        writer.write(pictures)
    return Planted(name, fault, cut)


def _voice(fault: str, voices: dict[str, Sequence[Samples]], rng: np.random.Generator) -> Samples:
    """Speech of the clip's length, of one speaker or of two, each half of it."""
    length = round(SECONDS * SPEECH_RATE)

    def some(speaker: str, samples: int) -> Samples:
        recording = voices[speaker][int(rng.integers(len(voices[speaker])))]
        start = int(rng.integers(max(1, len(recording) - samples)))
        part = recording[start : start + samples]
        return np.pad(part, (0, samples - len(part)))

    speakers = [str(one) for one in rng.permutation(sorted(voices))]
    if fault != "two_speakers":
        return some(speakers[0], length)
    return np.concatenate([some(speakers[0], length // 2), some(speakers[1], length - length // 2)])


def _write_over(pictures: Frames, words: str, rng: np.random.Generator) -> None:
    """Subtitles over the lower half of the face."""
    height = int(SIDE * rng.uniform(0.5, 0.62))
    for frame in pictures:
        for colour, thick in (((0, 0, 0), 5), ((255, 255, 255), 2)):
            cv2.putText(frame, words, (18, height), cv2.FONT_HERSHEY_SIMPLEX, 0.8, colour, thick, cv2.LINE_AA)


def _copy(folder: Path, name: str, original: str) -> Planted:
    """A copy of a clip, encoded anew, smaller and worse."""
    from talkingdit.media.files import read_video

    pictures, sound, fps, rate = read_video(folder / f"{original}.mp4")
    side = 224
    small = np.stack([cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA) for frame in pictures])
    with VideoWriter(folder / f"{name}.mp4", fps, (side, side), audio=sound, rate=rate, crf=26) as writer:
        writer.write(small)
    return Planted(name, "duplicate", original=original)
