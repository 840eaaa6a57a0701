# SPDX-License-Identifier: Apache-2.0
"""Do metrics notice what they should? Drawn clips with known faults of growing strength, and what metrics make of them.

In the drawn world the truth is known, so that every fault is exactly what its name says: `calibrate` degrades clips
step by step, and each metric that should notice has to get worse at every step.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from talkingdit.eval.clip import EvalClip, Frames
from talkingdit.eval.drawn import DrawnFinder
from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.metric import Metric, all_metrics
from talkingdit.media.sound import SPEECH_RATE
from talkingdit.puppets import VOICE
from talkingdit.puppets.render import render
from talkingdit.puppets.visemes import visemes_from_audio
from talkingdit.puppets.world import EXPRESSIONS, Character, FloatArray, Motion, Scene

FPS = 16


@dataclass(frozen=True)
class Scripted:
    """What a clip is drawn from, so that a fault can change one thing and leave the rest."""

    scene: Scene
    openings: FloatArray  # [F]
    widths: FloatArray  # [F]
    motion: Motion
    sound: FloatArray  # at 16 kHz
    size: int

    def draw(self) -> Frames:
        return render(self.scene, self.openings[None], self.widths[None], [self.motion], self.size)

    def clip(self, frames: Frames | None = None) -> EvalClip:
        return EvalClip(self.draw() if frames is None else frames, FPS, self.sound, "drawn")


@dataclass(frozen=True)
class Fault:
    """A fault of growing strength.

    Attributes:
        name: of it.
        levels: strengths, the weakest first; their unit is in `unit`.
        make: the faulty clip.
        noticed: metrics in regions, "ssim|whole", that get worse with every level.
    """

    name: str
    unit: str
    levels: tuple[float, ...]
    make: Callable[[Scripted, float], EvalClip]
    noticed: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """What a metric makes of a fault: mean values without it and at each level."""

    fault: str
    metric: str
    title: str
    levels: tuple[float, ...]
    values: tuple[float, ...]
    better: str

    @property
    def ordered(self) -> bool:
        """Does it get worse at every step?"""
        sign = 1 if self.better == "lower" else -1
        return all(sign * (after - before) > 0 for before, after in zip(self.values, self.values[1:], strict=False))


def _blur(script: Scripted, sigma: float) -> EvalClip:
    return script.clip(np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in script.draw()]))


def _compress(script: Scripted, crf: float) -> EvalClip:
    from talkingdit.media.files import VideoWriter, read_video

    frames = script.draw()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        with VideoWriter(file, FPS, frames.shape[1:3], crf=int(crf)) as video:
            video.write(frames)
        return script.clip(read_video(file)[0][: len(frames)])


def _freeze(script: Scripted, share: float) -> EvalClip:
    """The mouth stops where it is, for the last share of the clip."""
    still = round(len(script.openings) * (1 - share))
    openings = script.openings.copy()
    openings[still:] = openings[max(0, still - 1)]
    return dataclasses.replace(script, openings=openings).clip()


def _shift(script: Scripted, milliseconds: float) -> EvalClip:
    """The sound comes early, so that the mouth is late."""
    ahead = round(milliseconds / 1000 * SPEECH_RATE)
    sound = np.concatenate([script.sound[ahead:], np.zeros(ahead, np.float32)])
    return dataclasses.replace(script, sound=sound).clip()


def _swap(script: Scripted, share: float) -> EvalClip:
    """Somebody else from some frame on."""
    frames = script.draw()
    someone = script.scene.characters[0]
    other = next(
        one
        for one in (Character.random(np.random.default_rng(seed)) for seed in range(100))
        if len({*dataclasses.astuple(one)[:4]} & {*dataclasses.astuple(someone)[:4]}) == 0
    )
    drawn = dataclasses.replace(script, scene=dataclasses.replace(script.scene, characters=(other,))).draw()
    first = round(len(frames) * (1 - share))
    return script.clip(np.concatenate([frames[:first], drawn[first:]]))


def _grimace(script: Scripted, share: float) -> EvalClip:
    """Another expression from some frame on."""
    mood = "angry" if script.scene.expressions[0] in ("happy", "surprised") else "happy"
    drawn = dataclasses.replace(script, scene=dataclasses.replace(script.scene, expressions=(mood,))).draw()
    frames = script.draw()
    first = round(len(frames) * (1 - share))
    return script.clip(np.concatenate([frames[:first], drawn[first:]]))


def _jitter(script: Scripted, pixels: float) -> EvalClip:
    """Every other frame is moved."""
    out = script.draw()
    matrix = np.array([[1, 0, pixels], [0, 1, pixels]], np.float64)
    size = (script.size, script.size)
    for f in range(1, len(out), 2):
        out[f] = cv2.warpAffine(out[f], matrix, size, borderMode=cv2.BORDER_REPLICATE)
    return script.clip(out)


FAULTS = (
    Fault(
        "blur",
        "sigma in pixels",
        (0.7, 1.4, 2.8),
        _blur,
        ("ssim|whole", "psnr|whole", "ssim|face", "psnr|face", "sharpness|whole", "sharpness|face"),
    ),
    Fault("compression", "CRF", (24, 34, 44), _compress, ("ssim|whole", "psnr|whole", "ssim|face", "psnr|face")),
    Fault("frozen mouth", "share of frames", (0.3, 0.6, 1.0), _freeze, ("mouth_r|face", "sync_r|face", "psnr|face")),
    Fault("shifted sound", "ms early", (125, 250, 375), _shift, ("sync_error|face",)),
    Fault("swapped identity", "share of frames", (0.25, 0.5, 1.0), _swap, ("csim|face", "ssim|face", "psnr|whole")),
    Fault("other expression", "share of frames", (0.25, 0.5, 1.0), _grimace, ("expression_error|face",)),
    Fault("jitter", "pixels", (1, 2, 4), _jitter, ("motion_smoothness|whole", "motion_smoothness|face", "ssim|whole")),
)
# Less of it is worse in every fault here, though it is no measure of quality by itself.
WORSE_WITH = {"sharpness": "higher"}


def scripts(count: int, frames: int, size: int, seed: int = 0) -> list[Scripted]:
    """Clips of different characters who speak different parts of the voice that ships."""
    from talkingdit.media.files import read_audio

    voice = read_audio(VOICE)
    samples = round(frames * SPEECH_RATE / FPS)
    out = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        first = i * max(0, len(voice) - samples) // max(1, count)
        sound = voice[first : first + samples]
        mouth = visemes_from_audio(sound, FPS, frames)
        mood = str(rng.choice(EXPRESSIONS))
        scene = Scene((Character.random(rng),), (mood,))
        motion = Motion.random(rng, frames, FPS)
        out.append(Scripted(scene, mouth.opening, mouth.width, motion, sound, size))
    return out


def calibrate(
    count: int = 3, frames: int = 64, size: int = 96, faults: Sequence[Fault] = FAULTS, seed: int = 0
) -> list[Curve]:
    """What the metrics make of the faults, means over clips.

    Args:
        count: clips.
        frames, size: of each; 16 frames per second.
        faults: to plant.
        seed: of the characters.
    """
    drawn = scripts(count, frames, size, seed)
    truths = [script.clip() for script in drawn]
    metrics, out = all_metrics(), []
    for fault in faults:
        table: dict[str, list[float]] = {key: [] for key in fault.noticed}
        for level in (None, *fault.levels):
            made = truths if level is None else [fault.make(script, level) for script in drawn]
            seen = [_evidence(gen, truth) for gen, truth in zip(made, truths, strict=True)]
            for key in fault.noticed:
                name, region = key.split("|")
                table[key].append(float(np.mean([_value(metrics[name], one, region) for one in seen])))
        for key, values in table.items():
            metric = metrics[key.split("|")[0]]
            better = WORSE_WITH.get(metric.name, metric.better)
            title = f"{key.split('|')[1]} {metric.title}"
            out.append(Curve(fault.name, key, title, fault.levels, tuple(values), better))
    return out


def _evidence(gen: EvalClip, truth: EvalClip) -> Evidence:
    return Evidence(gen, truth, DrawnFinder(), frozenset(("whole", "face")), DrawnFinder.backbones)


def _value(metric: Metric, evidence: Evidence, region: str) -> float:
    assert metric.measure is not None
    try:
        return metric.measure(evidence, region).value
    except NotMeasured:
        return float("nan")


def figure(curves: Sequence[Curve]) -> str:
    """One small plot for each metric and fault, as SVG; those that are not ordered are red."""
    across, width, height = 4, 240, 150
    rows = -(-len(curves) // across)
    units = {fault.name: fault.unit for fault in FAULTS}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{across * width}" height="{rows * height}" '
        f'viewBox="0 0 {across * width} {rows * height}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>'
    ]
    for i, one in enumerate(curves):
        x, y = i % across * width, i // across * height
        colour = "#2f6fde" if one.ordered else "#b3261e"
        parts.append(f'<g transform="translate({x},{y})">{_plot(one, colour, units.get(one.fault, ""))}</g>')
    return "".join(parts) + "</svg>\n"


def _plot(one: Curve, colour: str, unit: str) -> str:
    low, high = min(one.values), max(one.values)
    span = (high - low) or 1.0
    xs = np.linspace(50, 220, len(one.values))
    ys = [112 - 78 * (value - low) / span for value in one.values]
    dots = "".join(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{colour}"/>' for x, y in zip(xs, ys, strict=True))
    line = " ".join(f"{x:.0f},{y:.0f}" for x, y in zip(xs, ys, strict=True))
    ticks = "".join(
        f'<text x="{x:.0f}" y="128" text-anchor="middle" fill="#555">{level:g}</text>'
        for x, level in zip(xs, (0, *one.levels), strict=True)
    )
    return (
        f'<text x="12" y="18" font-weight="bold">{one.fault}: {one.title}</text>'
        f'<text x="44" y="38" text-anchor="end" fill="#555">{high:.3g}</text>'
        f'<text x="44" y="115" text-anchor="end" fill="#555">{low:.3g}</text>'
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>{dots}{ticks}'
        f'<text x="135" y="142" text-anchor="middle" fill="#555">{unit}</text>'
    )
