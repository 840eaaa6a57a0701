# SPDX-License-Identifier: Apache-2.0
"""While Wan-S2V trains, it makes videos of given images and voices, with the averaged weights.

What the frozen encoders make of a case is made once, by rank 0, and kept in RUN/validation/cases; the text encoder then
leaves the memory. All ranks generate together, in step, because parameters are gathered from all of them, and the ranks
of context parallelism share the sequence as in training. Rank 0 writes RUN/validation/step-N-caseK.mp4.

No network that judges lip movements is at hand, so what is measured is coarse: whether the lower half of the frame
moves when the voice is loud (`motion_loudness`). It is a proxy: it sees a mouth that ignores the voice, and cannot tell
whether lips form the right sounds. For that, look at the videos.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from talkingdit.autoencoders.streaming import to_frames, to_video
from talkingdit.autoencoders.wan import load_vae
from talkingdit.checkpoints.saving import save_tensors
from talkingdit.data.encoders import CheckpointEncoders
from talkingdit.distributed.layout import Parallel
from talkingdit.distributed.team import from_rank_0
from talkingdit.errors import UserError
from talkingdit.families.training import TrainRun
from talkingdit.families.wan_s2v.checkpoint import WanS2VCheckpoint, find_parts
from talkingdit.families.wan_s2v.clips import encoders as clip_encoders
from talkingdit.families.wan_s2v.options import Options
from talkingdit.families.wan_s2v.outline import Sampling
from talkingdit.families.wan_s2v.pipeline import VideoConditions, WanS2VPipeline
from talkingdit.media.files import SPEECH_RATE, VideoWriter, read_audio, read_image
from talkingdit.media.framing import fit_image, output_size
from talkingdit.pipelines.long_video import generate_clips

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from talkingdit.families.wan_s2v.model import WanS2VModel
    from talkingdit.nn.context_parallel import ContextParallel

COLUMNS = ("image", "audio", "prompt")
SHOWN = 8  # frames of a video in the log


def motion_loudness(frames: NDArray[np.uint8], sound: NDArray[np.float32], fps: int) -> float | None:
    """Correlation of how much the lower half of a frame changes with how loud the voice is at that time.

    Args:
        frames: [n, H, W, 3].
        sound: [samples] at 16 kHz, beginning with the first frame; silence behind its end.
        fps: frames per second.

    Returns:
        Pearson's r in -1..1 over frames 1 .. n - 1, None where the sound or the frame does not change.
    """
    lower = frames[:, frames.shape[1] // 2 :].astype(np.float32)
    motion = np.abs(np.diff(lower, axis=0)).mean(axis=(1, 2, 3))
    ends = np.arange(1, len(frames) + 1) * SPEECH_RATE // fps
    silent = np.pad(sound, (0, max(0, int(ends[-1]) - len(sound))))
    loudness = np.array([np.sqrt(np.mean(part**2)) for part in np.split(silent[: ends[-1]], ends[:-1])])[1:]
    if len(motion) < 2 or np.ptp(motion) < 1e-6 or np.ptp(loudness) < 1e-6:
        return None
    return float(np.corrcoef(motion, loudness)[0, 1])


@dataclass(frozen=True)
class CaseFiles:
    """A row of the manifest of cases."""

    image: Path
    audio: Path
    prompt: str


@dataclass(frozen=True)
class ValidationCase:
    """What all ranks know of a case."""

    text: Tensor  # [2, L, text_dim]: prompt and negative prompt
    features: Tensor  # [layers, audio_dim, F], F a multiple of the frames per clip
    picture: Tensor  # uint8 [H, W, 3], the name that files of before have
    reference: Tensor  # [1, C, 1, H / 8, W / 8]
    sound: Tensor  # float32 [samples] at 16 kHz, as long as the video


def read_cases(manifest: Path) -> list[CaseFiles]:
    """Rows `{"image": "anna.jpg", "audio": "anna.wav", "prompt": "a woman talks"}`; paths as in the manifest's folder.

    Raises:
        UserError: the manifest cannot be read, or a row is none; the message has file and line.
    """
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"sample.cases: {manifest} cannot be read: {error}") from error
    cases = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{manifest}:{number}: expected a JSON object, got {line[:40]!r}") from error
        if not isinstance(row, dict) or not {"image", "audio"} <= row.keys() or not row.keys() <= set(COLUMNS):
            raise UserError(f"{manifest}:{number}: a case has image, audio and perhaps prompt, got {line[:80]!r}")
        image, audio = (manifest.parent / row[name] for name in ("image", "audio"))
        cases.append(CaseFiles(image, audio, row.get("prompt", "")))
    if not cases:
        raise UserError(f"sample.cases: {manifest} has no case")
    return cases


class WanS2VValidator:
    """Generates the first seconds of every case each time, with the same noise."""

    def __init__(self, run: TrainRun, device: torch.device, context: ContextParallel | None) -> None:
        """Encode the cases, or read what was encoded before; every rank must call this.

        Raises:
            UserError: the manifest, a file of it, or the checkpoint of the encoders is not good.
        """
        assert run.validation.cases is not None
        assert run.validation.encoders is not None
        self._run, self._wanted, self._manifest = run, run.validation, run.validation.cases
        self._device, self._context = device, context
        vae = find_parts(run.validation.encoders).vae
        self.folder = run.out / "validation"
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        encoders = clip_encoders(run.validation.encoders, dtype=dtype, device=str(device))
        self.settings = encoders.settings
        self.sampling = self._sampling()
        self.cases: list[ValidationCase] = from_rank_0(lambda: self._encode(encoders))
        self.vae: Any = load_vae(vae, torch.float32, "cpu").requires_grad_(False)

    def _sampling(self) -> Sampling:
        try:
            chosen = Options(
                steps=self._wanted.steps,
                guidance=self._wanted.text_guidance,
                shift=self._run.shift,
                clip_frames=4 * self._run.clip_latents,
            )
            return Sampling.of(chosen, self.settings)
        except ValueError as error:
            raise UserError(f"sample: {error}") from error

    def _encode(self, encoders: CheckpointEncoders) -> list[ValidationCase]:
        kept = self.folder / "cases"
        kept.mkdir(parents=True, exist_ok=True)
        made = []
        for number, files in enumerate(read_cases(self._manifest)):
            file, print_ = kept / f"case{number}.safetensors", self._fingerprint(files, encoders)
            case = _read(file, print_)
            if case is None:
                case = self._encode_one(files, encoders)
                save_tensors(vars(case), file, {"of": print_})
            made.append(case)
        vars(encoders).pop("loaded", None)  # the text encoder is as large as a small model
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return made

    def _encode_one(self, files: CaseFiles, encoders: CheckpointEncoders) -> ValidationCase:
        image, sound = read_image(files.image), read_audio(files.audio)
        size = output_size(image.shape[0], image.shape[1], self._wanted.max_area, self.settings.size_multiple)
        image, _ = fit_image(image, size)
        fps, clip = self.settings.fps, self.sampling.clip_frames
        frames = min(int(self._wanted.seconds * fps), -(-len(sound) * fps // SPEECH_RATE))
        frames = max(frames, self.sampling.dropped + 2)
        sound = sound[: frames * SPEECH_RATE // fps]
        loaded = encoders.loaded
        assert loaded.text_encoder is not None
        assert loaded.audio_encoder is not None
        with torch.no_grad():
            words = [files.prompt, self.sampling.negative_prompt]
            text = loaded.text_encoder.encode(words).features.float().cpu()
            features = loaded.audio_encoder.features(sound, -(-frames // clip) * clip).float().cpu()
        reference = loaded.latents(image[None])[None]
        return ValidationCase(text, features, torch.from_numpy(image), reference, torch.from_numpy(sound))

    def _fingerprint(self, files: CaseFiles, encoders: CheckpointEncoders) -> str:
        try:
            stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (files.image, files.audio)]
        except OSError as error:
            raise UserError(f"sample.cases: {error.filename} cannot be read: {error.strerror}") from error
        wanted = self._wanted
        said = (stats, files.prompt, str(encoders.folder), wanted.seconds, wanted.max_area, self.sampling)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:32]

    @torch.no_grad()
    def run(
        self, transformer: WanS2VModel, text_encoder: None, step: int, show: Callable[[str, Tensor], None]
    ) -> dict[str, float]:
        """Generate on all ranks; rank 0 writes the videos and shows some of their frames.

        Returns:
            motion_loudness_r (mean over the cases that it can be told of); nothing on other ranks than 0.
        """
        parallel = Parallel()
        parallel.context = self._context
        self.vae.to(self._device)
        missing: Any = None  # encoders, whose results are in the cases
        checkpoint = WanS2VCheckpoint(transformer, self.vae, missing, missing, self.settings, self._run.out)
        pipeline = WanS2VPipeline(checkpoint, parallel)
        measured = []
        for number, case in enumerate(self.cases):
            frames = self._generate(pipeline, case)
            if dist.get_rank() != 0:
                continue
            sound = case.sound.numpy()
            self._write(self.folder / f"step-{step:08d}-case{number}.mp4", frames, sound)
            show(f"case{number}", torch.from_numpy(frames[:: max(1, len(frames) // SHOWN)]).permute(0, 3, 1, 2))
            moving = frames[self.sampling.dropped :]
            measured.append(motion_loudness(moving, sound[self._skipped :], self.settings.fps))
        self.vae.to("cpu")
        told = [r for r in measured if r is not None]
        return {"motion_loudness_r": float(np.mean(told))} if told else {}

    def _write(self, file: Path, frames: NDArray[np.uint8], sound: NDArray[np.float32]) -> None:
        size = frames.shape[1], frames.shape[2]
        with VideoWriter(file, self.settings.fps, size, audio=sound, rate=SPEECH_RATE) as video:
            video.write(frames)

    @property
    def _skipped(self) -> int:
        """Samples of sound while the first frame stays."""
        return self.sampling.dropped * SPEECH_RATE // self.settings.fps

    def _generate(self, pipeline: WanS2VPipeline, case: ValidationCase) -> NDArray[np.uint8]:
        """Frames [n, H, W, 3] of a case; the first one stays for those that the beginning lacks."""
        count = len(case.sound) * self.settings.fps // SPEECH_RATE
        conditions = VideoConditions(
            sampling=self.sampling,
            text=case.text.to(self._device),
            reference=case.reference.to(self._device),
            pixels=to_video(case.picture.numpy()[None]).to(self._device),
            features=case.features,
            audio_frames=count,
        )
        clips = generate_clips(pipeline, conditions, conditions.clips)
        frames = np.concatenate([to_frames(clip.frames) for clip in clips])
        return np.concatenate([frames[:1].repeat(self.sampling.dropped, axis=0), frames])


def _read(file: Path, print_: str) -> ValidationCase | None:
    """A case that was encoded before from the same files in the same way."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as opened:
        if (opened.metadata() or {}).get("of") != print_:
            return None
        return ValidationCase(
            **{field.name: opened.get_tensor(field.name) for field in dataclasses.fields(ValidationCase)}
        )
