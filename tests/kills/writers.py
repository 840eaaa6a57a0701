# SPDX-License-Identifier: Apache-2.0
"""What is killed: every program of the project that writes over a longer time, as small as may be, saving often."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import safetensors.torch
import small_run
import soundfile
import torch
from clip_files import draw, voice, write_video
from official import make_official
from videos import folders as draw_small

import training.train
from talkingdit.cli.main import main
from talkingdit.data import ClipRequest
from talkingdit.data.cutting import Cutting
from talkingdit.data.manifest import read_manifest
from talkingdit.data.precompute import FinishedVideo, PrecomputeJob, precompute, prepare
from talkingdit.data.shards import PrecomputedShards
from talkingdit.errors import UserError
from talkingdit.families.wan_s2v.clips import encode_clip, encoders
from talkingdit.media.files import read_video
from training import export
from training.checkpoint import Checkpoints

SMALL = {"num_layers": 1, "audio_inject_layers": (0,), "audio_encoder_layers": 2, "vae_dim": 4}
OLD = b"what was there before"


def digests(folder: Path) -> dict[str, str]:
    """Of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Generate:
    """A video of three clips and its preview, over a file that is there."""

    def __init__(self, folder: Path):
        self.checkpoint = make_official(folder / "checkpoint", **SMALL)
        image = np.random.default_rng(0).integers(0, 255, (60, 70, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "face.png"), cv2.GaussianBlur(image, (9, 9), 3))
        sound = 0.2 * np.sin(np.arange(22400) * 0.08) * (np.arange(22400) % 4000 < 2000)
        soundfile.write(folder / "voice.wav", sound, 16000)
        self.inputs = folder

    def begin(self, folder: Path) -> None:
        (folder / "out.mp4").write_bytes(OLD)

    def run(self, folder: Path) -> int:
        files = ["--image", self.inputs / "face.png", "--audio", self.inputs / "voice.wav", "-o", folder / "out.mp4"]
        small = ["--max-area", "64x64", "--clip-frames", "8", "--steps", "1", "--prompt", "a person talking"]
        more = ["--checkpoint", self.checkpoint, "--sheet", folder / "sheet.png", "--threads", "1"]
        return main(["generate", *map(str, [*files, *small, *more])])

    def result(self, folder: Path) -> Any:
        frames = read_video(folder / "out.mp4")[0]
        return frames.shape, hashlib.sha256(frames.tobytes()).hexdigest(), digests(folder)["sheet.png"]

    def kept(self, folder: Path) -> int:
        if (folder / "out.mp4").read_bytes() != OLD:
            assert len(read_video(folder / "out.mp4")[0]) == 23
        parts = folder / "out.mp4.parts"
        carries = [int(path.stem.split("-")[1]) + 1 for path in parts.glob("carry-*.safetensors")]
        return max([count for count in carries if (parts / f"clip-{count - 1:04d}.mkv").is_file()], default=0)

    def goes_on(self, log: str) -> int:
        found = re.search(r"going on after (\d+) of 3 clips", log)
        return int(found[1]) if found else 0


class Precompute:
    """Clips of four videos in shards of one or two."""

    def __init__(self, folder: Path):
        settings = {"fps": 16, "motion_frames": 9, "infer_frames": 16, "size_multiple": 16}
        self.encoders = encoders(make_official(folder / "checkpoint", settings=settings, **SMALL))
        rows = []
        for number, frames in enumerate((16, 41, 20, 30)):
            write_video(folder / f"{number}.mp4", draw(frames), 16, voice(frames / 16))
            rows.append({"video": f"{number}.mp4", "caption": f"person {number} talks"})
        rows.append({"video": "none.mp4"})
        (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.manifest = folder / "m.jsonl"

    def begin(self, folder: Path) -> None:
        pass

    def run(self, folder: Path) -> int:
        cutting = Cutting(clip_frames=16, min_frames=8, max_area=32 * 48, multiple=16)
        job = PrecomputeJob(
            read_manifest(self.manifest), self.encoders, encode_clip, folder / "out", cutting, shard_bytes=1
        )
        steps: list[FinishedVideo] = []
        try:
            with prepare(job):
                precompute(job, report=steps.append)
        except UserError as error:
            print(error)
            return 2
        print(f"kept {sum(step.kept for step in steps)}")
        return 0

    def result(self, folder: Path) -> Any:
        source = PrecomputedShards(folder / "out")
        samples = [source.sample(i, np.random.default_rng(0), ClipRequest()) for i in range(len(source))]
        assert len({sample.key for sample in samples}) == len(samples)
        found = {}
        for sample in samples:
            tensors = {name: value for name, value in vars(sample).items() if isinstance(value, torch.Tensor)}
            found[sample.key] = hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()
        broken = [json.loads(line)["row"] for line in (folder / "out" / "broken.jsonl").read_text().splitlines()]
        assert source.empty_text is not None
        return found, broken

    def kept(self, folder: Path) -> int:
        try:
            return len(PrecomputedShards(folder / "out"))
        except UserError:
            assert not list((folder / "out").glob("clips-*.tar"))
            return 0

    def goes_on(self, log: str) -> int:
        return int(re.findall(r"^kept (\d+)$", log, re.MULTILINE)[-1])


class Train:
    """Six steps in two stages with a checkpoint every two, of which one is kept, and the exported model."""

    def __init__(self, folder: Path):
        self.config = small_run.make_world(folder)
        self.config.log.tensorboard = True
        self.config.checkpoint.keep = 1
        self.configuration = small_run.save_config(self.config, folder / "configuration")

    def begin(self, folder: Path) -> None:
        pass

    def run(self, folder: Path) -> int:
        sys.argv = ["train", "--config", str(self.configuration), "--run.out", str(folder / "run")]
        return training.train.main()

    def result(self, folder: Path) -> Any:
        steps = [int(line["step"]) for line in small_run.read_log(folder / "run")]
        assert steps == [1, 2, 3, 4, 5, 6], steps
        return digests(folder / "run" / "model")

    def kept(self, folder: Path) -> int:
        if not (folder / "run" / "checkpoints").is_dir():
            return 0
        found = Checkpoints(folder / "run" / "checkpoints", read_only=True).peek()
        return 0 if found is None else found["step"]

    def goes_on(self, log: str) -> int:
        found = re.search(r"(?:goes on|was done) after step (\d+)", log)
        return int(found[1]) if found else 0


class Export:
    """The model of a finished run, over an older one."""

    def __init__(self, folder: Path):
        train = Train(folder)
        child = os.fork()  # the process that forks again must not have trained
        if not child:
            os._exit(train.run(folder))
        assert not os.waitpid(child, 0)[1]
        self.source = folder / "run"

    def begin(self, folder: Path) -> None:
        (folder / "model" / "transformer").mkdir(parents=True)
        (folder / "model" / "transformer" / "config.json").write_bytes(OLD)

    def run(self, folder: Path) -> int:
        try:
            export.main(export.ExportFlags(self.source, folder / "model"))
        except UserError as error:
            print(error)
            return 2
        return 0

    def result(self, folder: Path) -> Any:
        return digests(folder / "model")

    def kept(self, folder: Path) -> None:
        models = [path for path in (folder / "model", *folder.glob(".away-*")) if path.is_dir()]
        texts = {model: model / "transformer" / "config.json" for model in models}
        old = [model for model in models if texts[model].is_file() and texts[model].read_bytes() == OLD]
        new = [model for model in models if digests(model) == digests(self.source / "model")]
        assert old or new, models
        assert folder / "model" in models or old, "what was there before is gone"

    def goes_on(self, log: str) -> int:
        return 0


class Eval:
    """Four videos of two systems and their truth: values, features of the set, tables and the report."""

    METRICS = "ssim,psnr,efid,found"

    def __init__(self, folder: Path):
        draw_small(folder)
        self.inputs = folder

    def begin(self, folder: Path) -> None:
        pass

    def run(self, folder: Path) -> int:
        systems = [f"--generated={name}={self.inputs / name}" for name in ("soft", "sharp")]
        files = [f"--truth={self.inputs / 'truth'}", "-o", str(folder / "out")]
        return main(["eval", *systems, *files, "--finder", "drawn", "--metrics", self.METRICS])

    def result(self, folder: Path) -> Any:
        found = digests(folder / "out")
        assert sum(name.endswith(".json") for name in found) == 1 + 6, found  # results, and each video once
        return found

    def kept(self, folder: Path) -> int:
        files = [file for file in (folder / "out" / "videos").glob("*.json") if not file.name.startswith(".")]
        for file in files:
            assert set(json.loads(file.read_text())) >= {"values", "features", "facts"}
            assert file.with_suffix(".safetensors").is_file()
        return len(files)

    def goes_on(self, log: str) -> int:
        found = re.search(r"6 videos judged, (\d) of them before", log)
        return int(found[1]) if found else 0


MAKE: dict[str, Callable[[Path], Any]] = {
    "generate": Generate,
    "precompute": Precompute,
    "train": Train,
    "export": Export,
    "eval": Eval,
}
