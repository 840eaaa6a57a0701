# SPDX-License-Identifier: Apache-2.0
"""What is heard: words that are wrong, quality of the voice, and SyncNet's distances between mouth and voice."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.metric import Metric, Value
from talkingdit.media.sound import SPEECH_RATE

SOUND = ("sound",)
SHORTEST = 1.0  # seconds that SyncNet needs


def normalised(text: str) -> list[str]:
    """The words of a text without case, punctuation and accents of typography; apostrophes inside of words stay."""
    plain = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    return [word.strip("'") for word in re.findall(r"[\w']+", plain) if word.strip("'")]


def word_errors(said: str, wanted: str) -> tuple[int, int]:
    """Words to insert, delete or replace to get from one text to the other, and how many were wanted."""
    a, b = normalised(said), normalised(wanted)
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1], len(b)


def _wer(evidence: Evidence, region: str) -> Value:
    if evidence.gen.sound is None:
        raise NotMeasured("the video has no sound")
    if not normalised(evidence.text):
        raise NotMeasured("no text was given for it")
    said = evidence.network("asr")(evidence.gen.sound)
    errors, words = word_errors(said, evidence.text)
    return Value(errors / words, note=f"{errors} of {words} words; heard: {said}")


def _mos(evidence: Evidence, region: str) -> Value:
    if evidence.gen.sound is None:
        raise NotMeasured("the video has no sound")
    score = evidence.network("speech_mos")(evidence.gen.sound)
    if score is None:
        raise NotMeasured("the sound is silent or shorter than a second")
    return Value(score)


def _syncnet(which: str) -> Callable[[Evidence, str], Value]:
    def of(evidence: Evidence, region: str) -> Value:
        clip = evidence.gen
        if clip.sound is None:
            raise NotMeasured("the video has no sound")
        if min(clip.seconds, len(clip.sound) / SPEECH_RATE) < SHORTEST:
            raise NotMeasured("it needs a second of pictures and sound")
        tracks = evidence.found.tracks.get("face", ())
        if not tracks:
            raise NotMeasured("no face was found")
        from talkingdit.detect.talking import heads

        network = evidence.network("syncnet")
        results = []
        for track in tracks:
            if not track.found.all():
                continue  # it reads five frames in a row
            results.append(network.judge(heads(clip.frames, track.boxes), clip.fps, clip.sound))
        if not results:
            raise NotMeasured("no face is there in every frame")
        best = max(results, key=lambda result: result.confidence)
        return Value(float(getattr(best, which)), note=f"offset {best.offset} frames of 25 per second")

    return of


METRICS = [
    Metric(
        name="sync_c",
        title="Sync-C",
        about="SyncNet's confidence: median minus least distance over shifts of sound against mouth",
        better="higher",
        regions=("face",),
        slot="syncnet",
        measure=_syncnet("confidence"),
        version=2,
    ),
    Metric(
        name="sync_d",
        title="Sync-D",
        about="SyncNet's least distance between mouth and sound",
        better="lower",
        regions=("face",),
        slot="syncnet",
        measure=_syncnet("distance"),
        version=2,
    ),
    Metric(
        name="wer",
        title="WER",
        about="share of wrong words, as a recogniser hears them",
        better="lower",
        regions=SOUND,
        slot="asr",
        text=True,
        measure=_wer,
    ),
    Metric(
        name="speech_mos",
        title="speech MOS",
        about="opinion score of the voice, 1 to 5",
        better="higher",
        regions=SOUND,
        slot="speech_mos",
        measure=_mos,
    ),
]
