# SPDX-License-Identifier: Apache-2.0
"""What may be said about a video of a HunyuanVideo-Avatar checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from talkingdit.families.flag import INTERVAL, SIDES, Flag, GenerationOptions, check_guidance_interval, check_step_cache
from talkingdit.families.hunyuan_avatar.emotions import Emotion, read_emotion
from talkingdit.families.hunyuan_avatar.speakers import Speaker, check_speakers, read_speaker

RELEASED = "released"  # the step cache of the released program


def read_step_cache(text: str) -> float | str:
    """A threshold, or `RELEASED`.

    Raises:
        ValueError: something else.
    """
    if text == RELEASED:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"must be a number or {RELEASED}, got {text!r}") from None


@dataclass(frozen=True, kw_only=True)
class Options(GenerationOptions):
    """None takes what the checkpoint suggests."""

    speaker: Annotated[tuple[Speaker, ...], Flag("NAME[:S]=WAV[@FACE]", read_speaker, many=True)] = ()
    """who speaks, and how much the voice moves the face (default: 1): a recording, and a mask.png, a moving mask.mp4 or
    a box x0,y0,x1,y1 of the face (default: a face that is found, left to right); may be given again"""
    turns: Annotated[Path | None, Flag("RTTM")] = None
    """who speaks when in the one recording of all, --audio"""
    emotion: Annotated[tuple[Emotion, ...], Flag("PNG[@FROM-TO]", read_emotion, many=True)] = ()
    """a picture of what the face should show, in these seconds (default: all the time); may be given again"""
    emotion_strength: Annotated[float, Flag("S")] = 1.0
    """how much the face follows it"""
    audio_strength: Annotated[float, Flag("S")] = 1.0
    """how much voices move faces"""
    size: Annotated[tuple[int, int] | None, SIDES] = None
    """exact size of the video, width and height (default: by the portrait)"""
    image_size: Annotated[int | None, Flag("N")] = None
    """the shorter side of the video in pixels (default: of the checkpoint, 704)"""
    guidance: Annotated[float | None, Flag("G")] = None
    """how strictly to follow prompt and voice in the beginning of the released schedule (default: of the checkpoint)"""
    text_guidance: Annotated[float | None, Flag("G")] = None
    """how strictly to follow the prompt, in place of the schedule"""
    audio_guidance: Annotated[float | None, Flag("G")] = None
    """how strongly to follow the voice, in place of the schedule"""
    negative_prompt: Annotated[str | None, Flag("WORDS")] = None
    """what not to show (default: of the checkpoint)"""
    text_features: Annotated[Path | None, Flag("SAFETENSORS")] = None
    """features of prompt and negative prompt from a file, in place of the text encoders"""
    sequential: bool = False
    """less memory, more time: one prediction after the other"""
    step_cache: Annotated[float | Literal["released"], Flag("T|released", read_step_cache)] = 0.0
    """threshold of the step cache: how much a step's input may change until the model is asked again (0: it is asked in
    every step); or `released`: most of the later steps run the last block alone, by the released schedule"""
    memory: Annotated[str, Flag("SWITCHES")] = ""
    """fit a smaller card, in words that `plan` suggests: weights=cast_fp8,offload=block,text_encoder=cpu,vae=tiled"""
    compile: bool = False
    """compile the blocks of the model: slow to begin with, faster then"""
    guidance_interval: Annotated[str, INTERVAL] = "0-1"
    """shares of the steps that guidance is taken in, such as 0.2-0.8; the others make one prediction, in less time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance", "text_guidance", "audio_guidance", "emotion_strength", "audio_strength"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"generate: {name} must be a number of at least 0, got {value}")
        if not isinstance(self.step_cache, str):
            check_step_cache(self.step_cache)
        elif self.step_cache != RELEASED:
            raise ValueError(f"generate: step_cache must be a number or {RELEASED}, got {self.step_cache!r}")
        check_guidance_interval(self.guidance_interval)
        check_speakers(self.speaker, self.turns is not None)
        if self.guidance is not None and (self.text_guidance is not None or self.audio_guidance is not None):
            raise ValueError("generate: guidance must be left out beside separate strengths of text and audio")
        if self.image_size is not None and self.image_size < 64:
            raise ValueError(f"generate: image_size must be at least 64, got {self.image_size}")
        if self.size is not None and self.image_size is not None:
            raise ValueError("generate: image_size must be left out beside an exact size")

    def voices(self) -> tuple[Path, ...]:
        return tuple(speaker.voice for speaker in self.speaker if speaker.voice is not None)

    def files(self) -> dict[str, Path]:
        found = super().files()
        for speaker in self.speaker:
            for what, path in (("voice", speaker.voice), ("mask", speaker.mask)):
                if path is not None:
                    found[f"{what} of {speaker.name}"] = path
        for number, emotion in enumerate(self.emotion, 1):
            found[f"emotion {number}"] = emotion.picture
        return found
