# SPDX-License-Identifier: Apache-2.0
"""Does a checkpoint speak? `python -m talkingdit.families.puppet.evaluate --voices data/voices`

Held-out characters speak with held-out voices, and the probe reads their mouths back from the frames (see
`talkingdit.puppets.measure` for the figures). One clip also goes through the whole job to an .mp4 and back, with the
sound taken from that file. What limits the figures is measured too: the round trip of drawn clips through the
autoencoder, and the probe's own error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from talkingdit.atomic import write_whole
from talkingdit.errors import UserError
from talkingdit.lock import alone, changing
from talkingdit.media.files import SPEECH_RATE
from talkingdit.puppets.measure import (
    Generator,
    HeldOutVoice,
    MeasureJob,
    RoundTrip,
    draw_job,
    evaluate,
    measure,
    measure_round_trip,
    table,
)
from talkingdit.puppets.probe import measure_probe_error
from talkingdit.puppets.render import Image
from talkingdit.puppets.world import FloatArray

PAGE = Path("docs/puppets.md")
MARKS = ("<!-- puppets:start -->", "<!-- puppets:end -->")


def read_voices(folder: Path, seconds: float, count: int, rng: np.random.Generator) -> list[HeldOutVoice]:
    """`count` stretches of held-out speech, the speakers in turn; recordings of one speaker are joined to `seconds`.

    Raises:
        UserError: the folder has no index.jsonl, or no held-out voice in it.
    """
    from talkingdit.encoders.log_mel import normalise_loudness
    from talkingdit.media.files import read_audio

    index = folder / "index.jsonl"
    try:
        entries = [json.loads(line) for line in index.read_text().splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{index}: not a readable list of voices ({error}).") from error
    speakers: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        if entry["split"] == "held_out":
            speakers.setdefault((entry["speaker"], entry["language"]), []).append(entry["path"])
    if not speakers:
        raise UserError(f"{index}: lists no voice of the split held_out.")
    for paths in speakers.values():
        rng.shuffle(paths)
    voices: list[HeldOutVoice] = []
    following = dict.fromkeys(speakers, 0)
    while len(voices) < count:
        speaker, language = name = list(speakers)[len(voices) % len(speakers)]
        parts: list[FloatArray] = []
        while sum(map(len, parts)) < seconds * SPEECH_RATE:
            path = speakers[name][following[name] % len(speakers[name])]
            following[name] += 1
            parts.append(read_audio(folder / path, SPEECH_RATE))
        samples = normalise_loudness(np.concatenate(parts)[: int(seconds * SPEECH_RATE)])
        voices.append(HeldOutVoice(speaker, language, samples))
    return voices


def insert_report(page: Path, text: str) -> None:
    """Put the table between the marks of a page.

    Raises:
        UserError: there is no such page, or it has no such marks.
    """
    with changing(page, "puppets evaluate"):
        try:
            content = page.read_text()
        except OSError as error:
            raise UserError(f"{page}: not a readable page to put the table into ({error}).") from error
        before, start, rest = content.partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        if not start or not end:
            raise UserError(f"{page}: has no lines {MARKS[0]} and {MARKS[1]} to put the table between.")
        write_whole(page, f"{before}{start}\n{text}\n{end}{after}".encode())


def machine() -> dict[str, Any]:
    """Where and with what the figures were made."""
    import diffusers
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        commit = found.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "machine": {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "commit": commit,
    }


def drawn_by(pipeline: Any, options: Any) -> Generator:
    """A generator of frames for `evaluate` from a `PuppetPipeline` and `Options`; seeds come from the jobs."""

    def generate(job: MeasureJob) -> Image:
        features, frames = pipeline.features(job.voice.samples)
        chosen = dataclasses.replace(options, seed=job.seed)
        clips = pipeline.generate(job.portrait, features, job.scene.caption(), chosen, frames=min(frames, job.frames))
        return np.concatenate(list(clips))

    return generate


def through_vae(vae: Any) -> RoundTrip:
    """Encoding and decoding with an autoencoder."""
    from talkingdit.autoencoders.streaming import StreamingDecoder, encode, to_frames, to_video

    return lambda frames: to_frames(StreamingDecoder(vae)(encode(vae, to_video(frames))))


def measure_mp4(job: MeasureJob, checkpoint: Any, options: Any) -> dict[str, Any]:
    """Run the whole job from files to an .mp4, read frames and sound back from it, and measure them."""
    import cv2
    import soundfile

    from talkingdit.encoders.log_mel import normalise_loudness
    from talkingdit.families.puppet.outline import outline
    from talkingdit.families.puppet.pipeline import open_pipeline
    from talkingdit.media.files import read_audio, read_video
    from talkingdit.pipelines.inputs import Job, read_inputs
    from talkingdit.pipelines.job import make_video

    with tempfile.TemporaryDirectory() as folder:
        image, audio, video = (Path(folder) / name for name in ("portrait.png", "voice.wav", "out.mp4"))
        cv2.imwrite(str(image), cv2.cvtColor(job.portrait, cv2.COLOR_RGB2BGR))
        peak = float(np.abs(job.voice.samples).max())
        soundfile.write(audio, job.voice.samples / max(1.0, peak), SPEECH_RATE)
        chosen = dataclasses.replace(options, seed=job.seed)
        inputs = read_inputs(Job(image=image, audio=audio, output=video, prompt=job.scene.caption()))
        make_video(inputs, outline(inputs, checkpoint.settings, chosen), open_pipeline(checkpoint))
        frames = read_video(video)[0]
        heard = HeldOutVoice(job.voice.speaker, job.voice.language, normalise_loudness(read_audio(video, SPEECH_RATE)))
    return measure(dataclasses.replace(job, voice=heard), frames, fps=checkpoint.settings.fps)


def main(arguments: list[str] | None = None) -> int:
    """Command line: evaluate a checkpoint, write the JSON, print the table."""
    parser = argparse.ArgumentParser(prog="python -m talkingdit.families.puppet.evaluate", description=__doc__)
    parser.add_argument("--voices", type=Path, required=True, help="folder of voices with an index.jsonl")
    parser.add_argument("--out", type=Path, default=Path("bench/results/puppets.json"), help="result (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="model to evaluate (default: the one shipped)")
    parser.add_argument("--clips", type=int, default=8, help="clips to generate, speakers in turn (%(default)s)")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of a clip (%(default)s)")
    parser.add_argument("--long-seconds", type=float, default=30.0, help="length of the long video (%(default)s)")
    parser.add_argument("--text-guidance", type=float, help="default: as the checkpoint suggests")
    parser.add_argument("--audio-guidance", type=float, help="default: as the checkpoint suggests")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as the checkpoint suggests)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and videos (%(default)s)")
    parser.add_argument("--threads", type=int, help="processor threads (default: all)")
    parser.add_argument("--report", action="store_true", help="put the table into docs/puppets.md, between its marks")
    options = parser.parse_args(arguments)
    if options.clips < 2:
        parser.error("--clips must be at least 2, to compare with another voice")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with alone([options.out], "an evaluation"):
            result = run(options)
            write_whole(options.out, (json.dumps(result, indent=1) + "\n").encode())
        print(table(result))
        if options.report:
            insert_report(PAGE, table(result))
    except UserError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the command measures, as one JSON object."""
    import torch

    from talkingdit import families
    from talkingdit.families.puppet.options import Options
    from talkingdit.families.puppet.pipeline import PuppetPipeline
    from talkingdit.puppets import MODEL

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rng = np.random.default_rng(options.seed)
    voices = read_voices(options.voices, options.seconds, options.clips, rng)
    (long_voice,) = read_voices(options.voices, options.long_seconds, 1, rng)
    folder = MODEL if options.checkpoint is None else options.checkpoint
    family = families.of_folder(folder)
    if family.name != "puppet":
        raise UserError(f"{folder}: only models of drawn characters can be measured with them.")
    checkpoint = family.checkpoint.load_checkpoint(folder, torch.float32, "cpu")
    settings = checkpoint.settings
    sampling = Options(text_guidance=options.text_guidance, audio_guidance=options.audio_guidance, steps=options.steps)

    def progress(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    generate = drawn_by(PuppetPipeline(checkpoint), sampling)
    result = evaluate(generate, voices, long_voice, settings.size, settings.fps, options.seed, progress)
    progress("one clip through an .mp4")
    frames = -(-len(voices[0].samples) * settings.fps // SPEECH_RATE)
    result["mp4"] = measure_mp4(draw_job(voices[0], frames, settings.size, options.seed), checkpoint, sampling)
    progress("drawn clips through the autoencoder")
    result["round_trip"] = measure_round_trip(
        voices, through_vae(checkpoint.vae), settings.size, options.seed, settings.fps
    )
    result["probe"] = measure_probe_error(size=settings.size)
    suggested = dataclasses.asdict(settings)
    used = {name: value for name, value in dataclasses.asdict(sampling).items() if value is not None}
    return {**machine(), "settings": suggested | used, "seed": options.seed, **result}


if __name__ == "__main__":
    sys.exit(main())
