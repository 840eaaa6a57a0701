# SPDX-License-Identifier: Apache-2.0
"""Does this mouth say what is heard, by networks whose weights the user gives: SyncNet and Light-ASD.

[watch.models]
syncnet = "weights/syncnet_v2.model"
light_asd = "weights/finetuning_TalkSet.model"

Both read the heads of everybody who is followed, 25 pictures a second, from the small pictures. They run on a card
where the process sees one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.slots import SLOTS, missing_line, path_of
from talkingdit.curate.stages import ClipFindings, Figures, Person
from talkingdit.detect.packages import NotInstalledError
from talkingdit.media.sound import SPEECH_RATE

SHORTEST = 1.0  # seconds that SyncNet needs
MOST = 4  # people who are looked at, the largest faces


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _need(watch: Watch, slot: str) -> None:
    if not watch.models.get(slot):
        raise NotInstalledError(missing_line(SLOTS[slot]) + ".")


def _talkers(look: Look, found: ClipFindings) -> list[Person]:
    """Whom to look at: nobody where nothing is said, or where it is too short to tell."""
    seconds = min(look.seconds, len(look.samples) / SPEECH_RATE)
    return found.people[:MOST] if found.spoken and seconds >= SHORTEST else []


class SyncnetStage:
    """SyncNet's confidence, distance and offset of the person whom the voice fits best (Chung and Zisserman 2016)."""

    gpu, slot, backbone = False, "syncnet", ""

    def __init__(self, watch: Watch) -> None:
        _need(watch, self.slot)
        from talkingdit.detect.syncnet import SyncNet

        self._network = SyncNet.from_file(path_of(watch, self.slot)).to(_device())

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        from talkingdit.detect.talking import heads

        people = _talkers(look, found)
        if not people:
            return {}
        results = [self._network.judge(heads(look.pictures, one.boxes), look.fps, look.samples) for one in people]
        best = max(range(len(results)), key=lambda i: results[i].confidence)
        return {
            "syncnet.confidence": round(results[best].confidence, 3),
            "syncnet.distance": round(results[best].distance, 3),
            "syncnet.offset": results[best].offset,
            "syncnet.person": best,
            "syncnet.confidences": [round(result.confidence, 3) for result in results],
            "syncnet.backbone": self.backbone,
        }


class LightAsdStage:
    """Who speaks: the person with the highest mean score while a voice is heard (Liao et al., CVPR 2023)."""

    gpu, slot, backbone = False, "light_asd", ""

    def __init__(self, watch: Watch) -> None:
        _need(watch, self.slot)
        from talkingdit.detect.light_asd import LightASD

        self._network: Any = LightASD.from_file(path_of(watch, self.slot)).to(_device())

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        from talkingdit.detect.talking import heads, mouths

        people = _talkers(look, found)
        if not people:
            return {}
        heard = _heard(found.spoken, len(look.pictures), look.fps)
        for person in people:
            seen = mouths(heads(look.pictures, person.boxes))
            person.speaking = self._network.judge(seen, look.fps, look.samples)
        return speaker([person.speaking for person in people if person.speaking is not None], heard) | {
            "active_speaker.backbone": self.backbone
        }


def speaker(scores: list[NDArray[np.float32]], heard: NDArray[np.bool_]) -> Figures:
    """Who of several people speaks.

    Args:
        scores: [F] of each, the one with the largest face first; above 0 somebody speaks.
        heard: bool [F], pictures in which there is a voice.
    """
    while_heard = [one[heard] if heard.any() else one for one in scores]
    means = [float(one.mean()) for one in while_heard]
    best = int(np.argmax(means))
    return {
        "active_speaker.score": round(means[best], 3),
        "active_speaker.person": best,
        "active_speaker.is_largest": int(best == 0),
        "active_speaker.share": round(float((while_heard[best] >= 0).mean()), 4),
        "active_speaker.scores": [round(mean, 3) for mean in means],
    }


def _heard(spoken: list[tuple[float, float]], count: int, fps: float) -> NDArray[np.bool_]:
    times = (np.arange(count) + 0.5) / fps
    heard = np.zeros(count, bool)
    for begin, end in spoken:
        heard |= (times >= begin) & (times < end)
    return heard
