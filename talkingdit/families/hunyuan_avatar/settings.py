# SPDX-License-Identifier: Apache-2.0
"""How a HunyuanVideo-Avatar checkpoint is used: what the official program has built in, or pipeline.json says."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from talkingdit.atomic import write_whole
from talkingdit.errors import UserError

FEATURES = ("whisper", "speech")  # kinds of features of a voice
PROMPT_PREFIX = "Authentic, Realistic, Natural, High-quality, Lens-Fixed, "
NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion, blurring, Lens changes"
)


@dataclass(frozen=True)
class HunyuanAvatarSettings:
    """How a checkpoint is used. The defaults are those of the released model and its official program.

    A file pipeline.json in the checkpoint folder may say other values.
    """

    fps: int = 25
    image_size: int = 704  # the shorter side of a frame, pixels
    size_multiple: int = 64  # sides are multiples of this many pixels
    window_latents: int = 33  # latent frames that are denoised together
    shift_latents: int = 10  # that the windows of a long video move on with every step
    steps: int = 50
    shift: float = 5.0  # of the noise schedule
    guidance: float = 7.5  # at the beginning of the released schedule
    text_guidance: float | None = None  # separate strengths in its place
    audio_guidance: float | None = None
    early_mask: float = 0.6  # of the face masks in the first steps
    features: str = "whisper"
    prompt_prefix: str = PROMPT_PREFIX
    negative_prompt: str = NEGATIVE_PROMPT

    def __post_init__(self) -> None:
        for name in ("fps", "image_size", "size_multiple", "window_latents", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"pipeline.json: {name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.shift_latents, int) or self.shift_latents < 0:
            raise ValueError(
                f"pipeline.json: shift_latents must be an integer of at least 0, got {self.shift_latents!r}"
            )
        if self.window_latents < 2:
            raise ValueError(f"pipeline.json: window_latents must be at least 2, got {self.window_latents}")
        if self.size_multiple % 16:
            raise ValueError(f"pipeline.json: size_multiple must be a multiple of 16, got {self.size_multiple}")
        for name in ("shift", "guidance", "early_mask", "text_guidance", "audio_guidance"):
            value = getattr(self, name)
            if value is None and name.endswith("_guidance"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ValueError(f"pipeline.json: {name} must be a number of at least 0, got {value!r}")
        if not self.shift:
            raise ValueError("pipeline.json: shift must be above 0, got 0")
        if self.features not in FEATURES:
            raise ValueError(f"pipeline.json: features must be one of {', '.join(FEATURES)}, got {self.features!r}")
        for name in ("prompt_prefix", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"pipeline.json: {name} must be a string, got {getattr(self, name)!r}")

    @staticmethod
    def load(path: Path) -> HunyuanAvatarSettings:
        """Read pipeline.json; a missing entry has its default, an unknown one is an error.

        Raises:
            UserError: not such a file, or an impossible value.
        """
        from talkingdit.checkpoints.weights import read_bounded

        values = read_bounded(path)
        known = {f.name for f in dataclasses.fields(HunyuanAvatarSettings)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"{path}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}.")
        try:
            return HunyuanAvatarSettings(**values)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path.parent}: {error}.") from error

    def save(self, path: Path) -> None:
        write_whole(path, (json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n").encode())
