# SPDX-License-Identifier: Apache-2.0
"""What a video of a talking puppet is worth, measured against the known truth, for any generator of frames.

The truth of output frame i is viseme i of the voice:

- r, slope, lag: correlation of measured with true opening, slope of measured against true, and the shift within +-4
  frames at which the correlation is best (with its value);
- shuffled: correlation with the truth of other voices, which must be near zero;
- identity, expression: share of frames in which the probe finds the character and mood of the portrait;
- thirds: identity, correlation and colour of the thirds of a long video, which show drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from talkingdit.media.files import SPEECH_RATE
from talkingdit.puppets.probe import Reading, probe
from talkingdit.puppets.render import Image, render
from talkingdit.puppets.visemes import Visemes, visemes_from_audio
from talkingdit.puppets.world import FloatArray, Motion, Scene

FRAMES_PER_LATENT = 4
LAGS = range(-4, 5)


@dataclass(frozen=True)
class HeldOutVoice:
    """A stretch of speech of one speaker nobody trained on."""

    speaker: str
    language: str
    samples: FloatArray  # [n] at 16 kHz, loudness normalised


@dataclass(frozen=True)
class MeasureJob:
    """One video to make: a portrait to bring to speech, and the voice that it speaks with."""

    scene: Scene
    portrait: Image  # [S, S, 3]
    voice: HeldOutVoice
    frames: int
    seed: int


Generator = Callable[[MeasureJob], Image]  # -> [frames, S, S, 3]
RoundTrip = Callable[[Image], Image]  # [1 + 4 n, S, S, 3] -> the same, through the autoencoder


def truth_of(voice: HeldOutVoice, frames: int, fps: int = 16) -> Visemes:
    """True mouth of a voice in each of so many frames; closed beyond its end."""
    return visemes_from_audio(voice.samples, fps, frames)


def correlation(a: FloatArray, b: FloatArray) -> float:
    """Pearson's r; 0 where one of them does not change."""
    if np.std(a) < 1e-6 or np.std(b) < 1e-6:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def sync(truth: FloatArray, measured: FloatArray) -> dict[str, float]:
    """How well a measured mouth follows the true one: r, slope, lag (positive: the video is late) and r_at_lag."""
    by_lag = {}
    for lag in LAGS:
        said = truth[max(0, -lag) : len(truth) - max(0, lag)]
        shown = measured[max(0, lag) : len(measured) - max(0, -lag)]
        by_lag[lag] = correlation(said, shown)
    best = max(by_lag, key=lambda lag: by_lag[lag])
    slope = float(np.polyfit(truth, measured, 1)[0]) if np.std(truth) > 1e-6 else 0.0
    return {"r": by_lag[0], "slope": slope, "lag": best, "r_at_lag": by_lag[best]}


def draw_job(voice: HeldOutVoice, frames: int, size: int, seed: int) -> MeasureJob:
    """A held-out character in a scene of its own; the portrait has the mouth closed."""
    scene = Scene.random(np.random.default_rng(seed), "held_out")
    closed = np.zeros((1, 1), np.float32)
    return MeasureJob(scene, render(scene, closed, closed + 0.5, [Motion.still(1)], size)[0], voice, frames, seed)


def colour_shift(frames: Image, portrait: Image) -> float:
    """How far the mean colour of frames is from the portrait's: RMS over the channels, in levels of 255."""
    return float(np.sqrt(np.mean((frames.mean((0, 1, 2)) - portrait.mean((0, 1))) ** 2)))


def measure(job: MeasureJob, frames: Image, reading: Reading | None = None, fps: int = 16) -> dict[str, Any]:
    """One row: sync, identity and expression of a generated video."""
    reading = probe(frames, fps=fps) if reading is None else reading
    truth = truth_of(job.voice, len(frames), fps).opening
    return {
        "speaker": job.voice.speaker,
        "language": job.voice.language,
        "seconds": round(len(job.voice.samples) / SPEECH_RATE, 2),
        "frames": len(frames),
        **sync(truth, reading.opening[0]),
        "identity": reading.identity_share(0, job.scene.characters[0]),
        "expression": reading.expression_share(0, job.scene.expressions[0]),
        "colour_shift": colour_shift(frames, job.portrait),
    }


def measure_long(job: MeasureJob, frames: Image, fps: int = 16) -> dict[str, Any]:
    """`measure` of a long video, and of each of its thirds what can drift."""
    reading = probe(frames, fps=fps)
    truth = truth_of(job.voice, len(frames), fps).opening
    who = job.scene.characters[0]
    thirds = []
    for part in np.array_split(np.arange(len(frames)), 3):
        piece = slice(part[0], part[-1] + 1)
        here = Reading(
            reading.opening[:, piece],
            [reading.identity[0][piece]],
            [reading.expression[0][piece]],
            reading.speaker[piece],
        )
        thirds.append(
            {
                "identity": here.identity_share(0, who),
                "r": correlation(truth[piece], here.opening[0]),
                "colour_shift": colour_shift(frames[piece], job.portrait),
            }
        )
    return {**measure(job, frames, reading, fps), "thirds": thirds}


def measure_round_trip(
    voices: Sequence[HeldOutVoice], through: RoundTrip, size: int, seed: int, fps: int = 16
) -> dict[str, Any]:
    """Sync of drawn videos after the autoencoder, the mean over voices: the ceiling for any model that uses it."""
    rows = []
    for i, voice in enumerate(voices):
        frames = (len(voice.samples) * fps // SPEECH_RATE - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1
        rng = np.random.default_rng([seed, i])
        truth = truth_of(voice, frames, fps)
        scene = Scene.random(rng, "held_out")
        drawn = render(scene, truth.opening[None], truth.width[None], [Motion.random(rng, frames, fps)], size)
        rows.append(sync(truth.opening, probe(through(drawn)).opening[0]))
    means: dict[str, Any] = {key: float(np.mean([row[key] for row in rows])) for key in ("r", "slope")}
    return means | {"worst_r": min(row["r"] for row in rows), "lags": sorted({int(row["lag"]) for row in rows})}


def evaluate(
    generate: Generator,
    voices: Sequence[HeldOutVoice],
    long_voice: HeldOutVoice,
    size: int = 96,
    fps: int = 16,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Generate one clip per voice and one long video, and measure them.

    Args:
        generate: makes the frames of a job.
        voices: held-out speech, at least two stretches.
        long_voice: speech for the long video.
        size: side of the frames.
        fps: frames a second.
        seed: of scenes and videos.
        progress: called with a word on what is being done.

    Returns:
        `rows` one per voice, `total` their means, `long` the long video.

    Raises:
        ValueError: fewer than two voices.
    """
    if len(voices) < 2:
        raise ValueError(f"evaluate: voices must be at least two, to compare with another's, got {len(voices)}")
    rows, curves = [], []
    for i, voice in enumerate(voices):
        if progress is not None:
            progress(f"clip {i + 1} of {len(voices)}: {voice.speaker} ({voice.language})")
        job = draw_job(voice, -(-len(voice.samples) * fps // SPEECH_RATE), size, seed + i)
        started = time.monotonic()
        frames = generate(job)
        took = time.monotonic() - started
        reading = probe(frames, fps=fps)
        curves.append(reading.opening[0])
        rows.append({**measure(job, frames, reading, fps), "generation_seconds": round(took, 2)})
    for i, row in enumerate(rows):
        others = [
            correlation(truth_of(v, len(curves[i]), fps).opening, curves[i]) for j, v in enumerate(voices) if j != i
        ]
        row["shuffled"] = float(np.mean(others))
    total: dict[str, Any] = {
        key: float(np.mean([row[key] for row in rows]))
        for key in (
            "r",
            "r_at_lag",
            "slope",
            "shuffled",
            "identity",
            "expression",
            "colour_shift",
            "generation_seconds",
        )
    }
    total["worst_r"] = min(row["r"] for row in rows)
    total["lags"] = sorted({int(row["lag"]) for row in rows})
    if progress is not None:
        progress("long video")
    job = draw_job(long_voice, -(-len(long_voice.samples) * fps // SPEECH_RATE), size, seed + len(voices))
    return {"rows": rows, "total": total, "long": measure_long(job, generate(job), fps)}


def table(result: dict[str, Any]) -> str:
    """The result as a markdown table."""

    def line(name: str, row: dict[str, Any], identity: str = "") -> str:
        lag = "/".join(str(v) for v in row["lags"]) if "lags" in row else str(row["lag"])
        cells = [
            name,
            f"{row['r']:.3f}",
            f"{lag}",
            f"{row['slope']:.2f}",
            f"{row['shuffled']:.2f}" if "shuffled" in row else "",
            f"{row['identity']:.1%}" if "identity" in row else "",
            f"{row['expression']:.1%}" if "expression" in row else "",
        ]
        return "| " + " | ".join(cells) + " |"

    lines = [
        "| | r | best lag (frames) | slope | r, another voice | identity | expression |",
        "|---|---|---|---|---|---|---|",
    ]
    speakers = dict.fromkeys((row["speaker"], row["language"]) for row in result["rows"])
    for speaker, language in speakers:
        rows = [row for row in result["rows"] if (row["speaker"], row["language"]) == (speaker, language)]
        mean = {k: np.mean([r[k] for r in rows]) for k in ("r", "slope", "shuffled", "identity", "expression")}
        mean["lags"] = sorted({int(row["lag"]) for row in rows})
        lines.append(line(f"{speaker} ({language}), {len(rows)} x {rows[0]['seconds']:.0f} s", mean))
    lines.append(line("**all**", result["total"]))
    lines.append(line(f"one video of {result['long']['seconds']:.0f} s", result["long"]))
    if "mp4" in result:
        lines.append(line("one clip read back from the .mp4", result["mp4"]))
    if "round_trip" in result:
        lines.append(line("drawn clips through the autoencoder", result["round_trip"]))
    error = result["probe"]
    lines.append(line("the probe on drawn frames", {**error, "lag": 0}))
    thirds = result["long"]["thirds"]
    lines += [
        "",
        "Thirds of the long video: identity "
        + ", ".join(f"{t['identity']:.1%}" for t in thirds)
        + "; r "
        + ", ".join(f"{t['r']:.2f}" for t in thirds)
        + "; mean colour off by "
        + ", ".join(f"{t['colour_shift']:.1f}" for t in thirds)
        + " of 255.",
    ]
    return "\n".join(lines)
