# SPDX-License-Identifier: Apache-2.0
"""Who speaks, with whose voice and which expression? `python -m talkingdit.families.hunyuan_avatar.evaluate --help`

Held-out characters of the drawn world, two and three in a picture, speak with held-out voices, and the probe reads
every mouth back from the frames (`talkingdit.puppets.scenes` has the measures). Each row is one claim:

    voices        a voice each: every mouth follows its own voice and no other
    silent        one has no voice: that mouth is still
    without masks one voice and no masks: whose mouths move (the paper's ablation)
    turns         one recording and a map of turns: only the one who speaks moves
    emotion       faces follow a track of pictures, and do not follow with strength 0
    injection     motion and identity of models with the picture injected in other ways
    seams         steps at the borders of windows against other steps

Results are kept row by row, so that an interrupted evaluation goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image as Picture

from talkingdit.atomic import write_whole
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.emotions import Emotion
from talkingdit.families.hunyuan_avatar.options import Options
from talkingdit.families.hunyuan_avatar.speakers import Speaker
from talkingdit.families.hunyuan_avatar.truth import Ask, true_generator
from talkingdit.families.puppet.evaluate import machine, read_voices
from talkingdit.lock import alone
from talkingdit.media.boxes import Box
from talkingdit.media.files import SPEECH_RATE
from talkingdit.puppets.measure import HeldOutVoice, correlation, truth_of
from talkingdit.puppets.probe import probe
from talkingdit.puppets.render import Image
from talkingdit.puppets.scenes import (
    face_boxes,
    measure_moods,
    measure_motion,
    measure_mouths,
    measure_seams,
    measure_turns,
    plain_caption,
    portrait_of,
)
from talkingdit.puppets.world import EXPRESSIONS, Character, FloatArray, Scene

TRACK = ("happy", "surprised", "angry")  # moods of a track, one after the other
SEAM_VIDEOS = 4  # times as many for steps at borders as for other rows


Generator = Callable[[Ask], Image]  # -> [F, S, S, 3]


def generator(checkpoint: Any, steps: int | None = None) -> Generator:
    """What makes videos with a checkpoint, by way of the files that a user would give."""
    from talkingdit.autoencoders.streaming import to_frames
    from talkingdit.families.hunyuan_avatar.outline import outline
    from talkingdit.families.hunyuan_avatar.pipeline import open_pipeline
    from talkingdit.pipelines.inputs import Job, read_inputs
    from talkingdit.pipelines.long_video import generate_clips

    pipeline = open_pipeline(checkpoint)
    size = checkpoint.settings.image_size

    def generate(ask: Ask) -> Image:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            options, audio = _options(ask, folder, size, steps)
            job = Job(
                image=folder / "portrait.png", audio=audio, output=folder / "out.mp4", prompt=plain_caption(ask.scene)
            )
            inputs = read_inputs(job)
            planned = outline(inputs, checkpoint.settings, options)
            conditions = pipeline.encode(inputs, planned)
            clips = [to_frames(clip.frames) for clip in generate_clips(pipeline, conditions, planned.clips)]
        return np.concatenate([frames for frames in clips if len(frames)])

    return generate


def draw_sheet(checkpoint: Any, ask: Ask, path: Path, steps: int | None = None) -> None:
    """The preview sheet of a video."""
    from talkingdit.families.hunyuan_avatar.outline import outline
    from talkingdit.families.hunyuan_avatar.pipeline import open_pipeline
    from talkingdit.pipelines.inputs import Job, read_inputs
    from talkingdit.pipelines.job import make_video

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options, audio = _options(ask, folder, checkpoint.settings.image_size, steps)
        image, words = folder / "portrait.png", plain_caption(ask.scene)
        inputs = read_inputs(Job(image=image, audio=audio, output=folder / "out.mp4", prompt=words, sheet=path))
        make_video(inputs, outline(inputs, checkpoint.settings, options), open_pipeline(checkpoint))


def _options(ask: Ask, folder: Path, size: int, steps: int | None) -> tuple[Options, Path]:
    """The files of a video, the options that name them, and the sound of all."""
    Picture.fromarray(portrait_of(ask.scene, size)).save(folder / "portrait.png")
    boxes: list[Box] = [
        (x0 * size, y0 * size, x1 * size, y1 * size) for x0, y0, x1, y1 in face_boxes(len(ask.scene.characters))
    ]
    everywhere: Box = (0.0, 0.0, float(size), float(size))
    speakers = []
    for i in range(len(boxes)):
        box = boxes[i] if ask.masks else everywhere
        samples = None if ask.turns else ask.voices[i]
        if samples is not None:
            _write(folder / f"{i}.wav", samples)
            speakers.append(Speaker(f"p{i}", folder / f"{i}.wav", box=box))
        elif ask.turns:
            speakers.append(Speaker(f"p{i}", box=box))
    given = [samples for samples in ask.voices if samples is not None]
    mixture = np.zeros(max(map(len, given)), np.float32)
    for samples in given:
        mixture[: len(samples)] += samples
    _write(folder / "all.wav", mixture)
    turns = None
    if ask.turns:
        turns = folder / "turns.rttm"
        lines = [f"SPEAKER all 1 {start} {end - start} <NA> <NA> p{who} <NA> <NA>" for who, start, end in ask.turns]
        turns.write_text("\n".join(lines) + "\n")
    emotions = []
    for i, (mood, start, end) in enumerate(ask.moods):
        other = Scene((Character.random(np.random.default_rng([7, i]), "held_out"),), (mood,))
        Picture.fromarray(portrait_of(other, size)).save(folder / f"mood{i}.png")
        emotions.append(Emotion(folder / f"mood{i}.png", start, end))
    options = Options(
        speaker=tuple(speakers), turns=turns, emotion=tuple(emotions), emotion_strength=ask.mood_strength,
        seed=ask.seed, steps=steps,
    )  # fmt: skip
    return options, folder / "all.wav"


def _write(path: Path, samples: FloatArray) -> None:
    soundfile.write(path, samples / max(1.0, float(np.abs(samples).max())), SPEECH_RATE)


def held_out_scene(seed: int, number: int, people: int) -> Scene:
    """Held-out people with calm faces."""
    scene = Scene.random(np.random.default_rng([seed, number, people]), "held_out", people)
    return replace(scene, expressions=("neutral",) * people)


# ---- Rows ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bench:
    """What all rows have in common.

    Attributes:
        generate: makes videos.
        voices: held-out speech, at least three stretches.
        fps: frames per second.
        window, shift, steps: of the denoising, for the borders of windows.
        seed: of scenes and noise.
        scenes: for each row.
    """

    generate: Generator
    voices: Sequence[HeldOutVoice]
    fps: int
    window: int
    shift: int
    steps: int
    seed: int = 0
    scenes: int = 4

    def scene(self, number: int, people: int) -> Scene:
        return held_out_scene(self.seed, number, people)

    def voice(self, number: int) -> HeldOutVoice:
        return self.voices[number % len(self.voices)]

    def truth(self, samples: FloatArray | None, frames: int) -> FloatArray:
        """How far a voice opens the mouth in each frame; zeros for none."""
        if samples is None:
            return np.zeros(frames, np.float32)
        return truth_of(HeldOutVoice("", "", samples), frames, self.fps).opening


def voices_row(bench: Bench) -> dict[str, Any]:
    """A voice each, with two and with three people.

    Two voices are alike by chance, short ones more so: "chance" is what perfect mouths would show of the others'.
    """
    own: dict[int, list[float]] = {2: [], 3: []}
    others: dict[int, list[float]] = {2: [], 3: []}
    chance: dict[int, list[float]] = {2: [], 3: []}
    for people in own:
        for number in range(bench.scenes):
            given = [bench.voice(number * people + i).samples for i in range(people)]
            frames = bench.generate(Ask(bench.scene(number, people), given, seed=bench.seed + number))
            truth = np.stack([bench.truth(samples, len(frames)) for samples in given])
            found = measure_mouths(frames, truth, bench.fps)
            own[people] += found["own"]
            others[people] += found["others"]
            chance[people] += _alike(truth)
    return {
        f"{name} of {people}": float(np.mean(values[people]))
        for people in own
        for name, values in (("own", own), ("others", others), ("chance", chance))
    } | {"worst own": float(min(own[2] + own[3])), "worst other": float(max(others[2] + others[3]))}


def _alike(truth: FloatArray) -> list[float]:
    """The largest absolute correlation of each row [people, F] with another."""
    return [max(abs(correlation(one, other)) for j, other in enumerate(truth) if j != i) for i, one in enumerate(truth)]


def silent_row(bench: Bench) -> dict[str, Any]:
    """Two people, of whom one has no voice: how much that mouth moves, in shares of the talker's."""
    shares = []
    for number in range(bench.scenes):
        given = [bench.voice(number).samples, None]
        frames = bench.generate(Ask(bench.scene(number, 2), given, seed=bench.seed + number))
        shares += measure_mouths(frames, np.stack([bench.truth(s, len(frames)) for s in given]), bench.fps)["silent"]
    return {"share": float(np.mean(shares)), "worst": float(max(shares))}


def unmasked_row(bench: Bench) -> dict[str, Any]:
    """One voice without masks: correlation of both mouths with it."""
    found = []
    for number in range(bench.scenes):
        given = [bench.voice(number).samples, None]
        frames = bench.generate(Ask(bench.scene(number, 2), given, masks=False, seed=bench.seed + number))
        truth = bench.truth(given[0], len(frames))
        found.append([correlation(truth, row) for row in probe(frames, 2, bench.fps).opening])
    first, second = np.mean(found, axis=0)
    return {"first": float(first), "second": float(second)}


def turns_row(bench: Bench) -> dict[str, Any]:
    """One recording in which two take turns: share of frames in which the one who speaks moves most."""
    shares = []
    for number in range(bench.scenes):
        one, other = bench.voice(number).samples, bench.voice(number + 1).samples
        half = min(len(one), len(other)) // 2 // SPEECH_RATE * SPEECH_RATE
        if not half:
            raise UserError("evaluate: turns take voices of two seconds at least; raise --seconds.")
        mixture, at = np.concatenate([one[:half], other[:half]]), half / SPEECH_RATE
        turns = [(0, 0.0, at), (1, at, 2 * at)]
        frames = bench.generate(Ask(bench.scene(number, 2), [mixture], turns=turns, seed=bench.seed + number))
        speaking = [0 if (i + 0.5) / bench.fps < at else 1 for i in range(len(frames))]
        shares.append(measure_turns(frames, speaking, bench.fps))
    return {"share": float(np.nanmean(shares)), "worst": float(np.nanmin(shares))}


def emotion_row(bench: Bench) -> dict[str, Any]:
    """A track of moods: share of frames that follow it and the longest delay, with the module and without."""
    follows, delays, without = [], [], []
    for number in range(bench.scenes):
        samples = bench.voice(number).samples
        seconds = len(samples) / SPEECH_RATE
        ends = [seconds * (i + 1) / len(TRACK) for i in range(len(TRACK))]
        track = [(mood, end - seconds / len(TRACK), end) for mood, end in zip(TRACK, ends, strict=True)]
        ask = Ask(bench.scene(number, 1), [samples], moods=track, seed=bench.seed + number)
        frames = bench.generate(ask)
        told = [next((m for m, _, end in track if (i + 0.5) / bench.fps < end), TRACK[-1]) for i in range(len(frames))]
        found = measure_moods(frames, told, 1, bench.fps)
        follows.append(found["follows"])
        delays.append(found["delay"])
        without.append(measure_moods(bench.generate(replace(ask, mood_strength=0.0)), told, 1, bench.fps)["follows"])
    return {
        "follows": float(np.mean(follows)),
        "delay": float(np.max(delays)),
        "without": float(np.mean(without)),
        "chance": 1 / len(EXPRESSIONS),
    }


def motion_row(bench: Bench) -> dict[str, Any]:
    """Motion, identity and sync of two people who talk: a line of the table of injections."""
    found = []
    for number in range(bench.scenes):
        given = [bench.voice(number + i).samples for i in range(2)]
        scene = bench.scene(number, 2)
        frames = bench.generate(Ask(scene, given, seed=bench.seed + number))
        truth = np.stack([bench.truth(samples, len(frames)) for samples in given])
        sync = float(np.mean(measure_mouths(frames, truth, bench.fps)["own"]))
        found.append({**measure_motion(frames, scene, bench.fps), "sync": sync})
    return {name: float(np.nanmean([row[name] for row in found])) for name in ("identity", "motion", "sync")}


def seams_row(bench: Bench) -> dict[str, Any]:
    """The step between frames at the borders of the windows of the last denoising step, over other steps.

    Mouths move in bursts, so that a few borders say little: there are more videos than in other rows. Borders fall
    between latents, where the autoencoder shows a larger step than within one in right videos too: so they are compared
    with all other steps, and with those at the beginnings of other latents.
    """
    ratios: dict[str, list[float]] = {"ratio": [], "ratio to latents": []}
    for number in range(SEAM_VIDEOS * bench.scenes):
        frames = bench.generate(Ask(bench.scene(number, 1), [bench.voice(number).samples], seed=bench.seed + number))
        at = borders(len(frames), bench.window, bench.shift, bench.steps)
        ratios["ratio"].append(measure_seams(frames, at))
        ratios["ratio to latents"].append(measure_seams(frames, at, range(1, len(frames), 4)))
    means = {name: float(np.nanmean(values)) for name, values in ratios.items()}
    return means | {"worst": float(np.nanmax(ratios["ratio"]))}


def borders(frames: int, window: int, shift: int, steps: int) -> list[int]:
    """First frames behind the borders of the windows of the last step."""
    moved = (steps - 1) * shift % window
    latents = range(-moved, frames // 4 + 2, window)
    return [4 * latent - 3 for latent in latents if latent > 0 and 4 * latent - 3 < frames]


ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "voices": voices_row,
    "silent": silent_row,
    "without masks": unmasked_row,
    "turns": turns_row,
    "emotion": emotion_row,
    "injection": motion_row,
    "seams": seams_row,
}


# ---- The command -----------------------------------------------------------------------------------------------------
def table(rows: dict[str, dict[str, Any]]) -> str:
    """Results as a markdown table."""
    lines = ["| | |", "|---|---|"]
    for name, row in rows.items():
        told = (f"{key} {'none' if value is None else f'{value:.3f}'}" for key, value in row.items())
        lines.append(f"| {name} | {', '.join(told)} |")
    return "\n".join(lines)


def open_checkpoint(folder: Path) -> Any:
    """A checkpoint of the family, of the drawn world.

    Raises:
        UserError: it is another one's.
    """
    import torch

    from talkingdit import families

    family = families.of_folder(folder)
    if family.name != "hunyuan_avatar":
        raise UserError(f"{folder}: expected a HunyuanVideo-Avatar checkpoint, got one of {family.title}.")
    checkpoint = family.checkpoint.load_checkpoint(folder, torch.float32, "cpu")
    if checkpoint.settings.features != "speech":
        raise UserError(f"{folder}: only models of the drawn world can be measured with it.")
    return checkpoint


def open_voices(options: argparse.Namespace) -> list[HeldOutVoice]:
    """Held-out speech."""
    count, rng = max(3, options.scenes), np.random.default_rng(options.seed)
    return list(read_voices(options.voices, options.seconds, count, rng))


def draw_example(options: argparse.Namespace) -> None:
    """Two people who each speak with their own voice, first happy, then surprised."""
    half, seed = options.seconds / 2, options.seed
    voices = [voice.samples for voice in open_voices(options)[:2]]
    moods = [("happy", 0.0, half), ("surprised", half, 2 * half)]
    ask = Ask(held_out_scene(seed, 0, 2), voices, moods=moods, seed=seed)
    draw_sheet(open_checkpoint(options.checkpoint), ask, options.sheet, options.steps)


def open_bench(folder: Path, options: argparse.Namespace) -> Bench:
    """What a checkpoint is measured with."""
    checkpoint = open_checkpoint(folder)
    settings = checkpoint.settings
    if options.truth:
        make = true_generator(checkpoint.vae, settings.image_size, settings.fps)
    else:
        make = generator(checkpoint, options.steps)
    return Bench(
        make, open_voices(options), settings.fps, settings.window,
        settings.shift_offset, options.steps or settings.steps, options.seed, options.scenes,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Command line: measure a checkpoint, write the JSON, print the table."""
    parser = argparse.ArgumentParser(prog="python -m talkingdit.families.hunyuan_avatar.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, required=True, help="model to measure")
    parser.add_argument("--voices", type=Path, required=True, help="folder of voices with an index.jsonl")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/hunyuan_avatar_scenes.json"), help="(%(default)s)"
    )
    parser.add_argument(
        "--injection", action="append", default=[], metavar="NAME=DIR", help="another model for that table"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="draw the sheet of a video of two people, and no more"
    )
    parser.add_argument(
        "--truth", action="store_true", help="measure what is drawn, through the checkpoint's autoencoder, instead"
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="only these")
    parser.add_argument("--scenes", type=int, default=4, help="videos for each row (%(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a video (%(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as the checkpoint suggests)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and videos (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.sheet is not None:  # which the making of its video locks
            options.sheet.parent.mkdir(parents=True, exist_ok=True)
            draw_example(options)
            return 0
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with alone([options.out], "an evaluation"):
            print(table(run(options)["rows"]))
    except UserError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All rows as one JSON object; those that an earlier run of the same request wrote are taken from there."""
    names = ("checkpoint", "scenes", "seconds", "steps", "seed", *(["truth"] if options.truth else []))
    asked = {name: str(getattr(options, name)) for name in names}
    rows: dict[str, dict[str, Any]] = {}
    if options.out.is_file():
        before = json.loads(options.out.read_text())
        rows = before["rows"] if before.get("asked") == asked else {}
    wanted: dict[str, tuple[Path, str]] = {name: (options.checkpoint, name) for name in options.rows}
    for word in options.injection:
        name, given, folder = word.partition("=")
        if not given:
            raise UserError(f"evaluate: --injection must be NAME=DIR, got {word!r}.")
        wanted[f"injection {name}"] = (Path(folder), "injection")
    benches: dict[Path, Bench] = {}
    result = {**machine(), "asked": asked, "rows": rows}
    for name, (folder, kind) in wanted.items():
        if name in rows:
            continue
        print(name, file=sys.stderr, flush=True)
        if folder not in benches:
            benches[folder] = open_bench(folder, options)
        found = ROWS[kind](benches[folder])
        rows[name] = {key: None if np.isnan(value) else value for key, value in found.items()}  # JSON has no NaN
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())
    return result


if __name__ == "__main__":
    sys.exit(main())
