# SPDX-License-Identifier: Apache-2.0
"""Where somebody speaks: Silero VAD, with the weights that the package silero-vad carries, run by ONNX Runtime."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from talkingdit.detect.packages import NotInstalledError, package_file
from talkingdit.media.sound import SPEECH_RATE

GET = "pip install 'talkingdit[curate]'"
HOP, PAST = 512, 64  # samples of a step, and of the step before that the network is given
STEP = HOP / SPEECH_RATE  # seconds
STATE = (2, 1, 128)
_LOCK = threading.Lock()

Samples = NDArray[np.float32]


def speech(samples: Samples) -> NDArray[np.float32]:
    """Probability of speech in each step of 32 ms.

    Args:
        samples: float32 [n], 16 kHz mono.

    Returns:
        float32 [ceil(n / 512)], 0 to 1.

    Raises:
        NotInstalledError: the weights, or what runs them, are not installed.
    """
    steps = -(-len(samples) // HOP)
    padded = np.zeros(steps * HOP + PAST, np.float32)
    padded[PAST : PAST + len(samples)] = samples
    state = np.zeros(STATE, np.float32)
    found = np.zeros(steps, np.float32)
    session = _session()
    with _LOCK:
        for step in range(steps):
            part = padded[step * HOP : step * HOP + HOP + PAST]
            inputs = {"input": part[None], "state": state, "sr": np.array(SPEECH_RATE, np.int64)}
            probability, state = session.run(None, inputs)
            found[step] = probability.item()
    return found


def spans(probabilities: NDArray[np.float32], threshold: float = 0.5, gap: float = 0.25) -> list[tuple[float, float]]:
    """Seconds (from, to) where somebody speaks; pauses shorter than `gap` seconds belong to the speech."""
    found: list[tuple[float, float]] = []
    for step in np.nonzero(probabilities >= threshold)[0]:
        begin, end = float(step) * STEP, float(step + 1) * STEP
        if found and begin - found[-1][1] < gap:
            found[-1] = found[-1][0], end
        else:
            found.append((begin, end))
    return found


@lru_cache(maxsize=1)
def _session() -> Any:
    file = package_file("silero_vad", "data/silero_vad.onnx", GET)
    try:
        import onnxruntime
    except ImportError as error:
        raise NotInstalledError(f"onnxruntime is not installed; `{GET}` brings it.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
