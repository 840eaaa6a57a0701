# SPDX-License-Identifier: Apache-2.0
"""Who speaks, with which expression, and whether the mouth follows the sound."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from talkingdit.eval.clip import envelope
from talkingdit.eval.evidence import Evidence, NotMeasured
from talkingdit.eval.metric import FloatArray, Metric, Value, over_people
from talkingdit.eval.metrics.features import alike

FACE = ("face",)
REACH = 0.5  # seconds by which sound and mouth are shifted against each other
LEAST_SECONDS = 1.0
EXPRESSION_SAMPLES = 2048
IDENTITY_FRAMES = 16  # of a video, evenly spread


def lagged(mouth: FloatArray, loud: FloatArray, reach: int) -> dict[int, float]:
    """Pearson's r of a mouth [F] with loudness [F], by frames that the mouth is late; NaN where one does not change.

    The mouth is compared with the loudness's square root, whose range is nearer to a mouth's. Frames without a face do
    not count.
    """
    out = {}
    for lag in range(-reach, reach + 1):
        shown = mouth[max(0, lag) : len(mouth) + min(0, lag)]
        heard = np.sqrt(loud)[max(0, -lag) : len(loud) - max(0, lag)]
        known = ~np.isnan(shown)
        a, b = shown[known], heard[known]
        out[lag] = float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() > 1e-9 and b.std() > 1e-9 else float("nan")
    return out


def _speaking(evidence: Evidence) -> tuple[dict[int, float], FloatArray]:
    """Correlations by lag of the face that follows the sound best, and its mouth."""
    clip = evidence.gen
    if clip.sound is None:
        raise NotMeasured("the video has no sound")
    if clip.seconds < LEAST_SECONDS:
        raise NotMeasured(f"needs {LEAST_SECONDS:g} s of video, got {clip.seconds:.2f} s")
    mouths = evidence.found.openings
    if not mouths:
        raise NotMeasured("no face was found")
    loud = envelope(clip, len(clip.frames))
    if loud.max(initial=0) < 1e-3:
        raise NotMeasured("the sound is silent")
    reach = min(round(REACH * clip.fps), len(clip.frames) // 3)
    by_face = [(lagged(mouth, loud, reach), mouth) for mouth in mouths]
    return max(by_face, key=lambda one: np.nan_to_num(max(one[0].values(), key=np.nan_to_num)))


def _sync_r(evidence: Evidence, region: str) -> Value:
    by_lag, mouth = _speaking(evidence)
    curve = tuple(None if np.isnan(value) else float(value) for value in mouth)
    # A mouth that does not move follows nothing.
    return Value(float(np.nan_to_num(by_lag[0])), curve)


def _sync_offset(evidence: Evidence, region: str) -> Value:
    by_lag, _ = _speaking(evidence)
    best = max(by_lag, key=lambda lag: np.nan_to_num(by_lag[lag], nan=-2))
    if np.isnan(by_lag[best]) or by_lag[best] < 0.2:
        raise NotMeasured(f"the mouth follows the sound at no shift within {REACH:g} s")
    return Value(1000 * best / evidence.gen.fps, note=f"r {by_lag[best]:.2f} there")


def _sync_error(evidence: Evidence, region: str) -> Value:
    value = _sync_offset(evidence, region)
    return Value(abs(value.value), note=value.note)


def _mouth_r(evidence: Evidence, region: str) -> Value:
    """Pearson's r of a mouth with the true mouth."""
    found, true = evidence.found.openings, evidence.found_in_truth.openings
    n, values = evidence.frames, []
    for i, partner in enumerate(evidence.partners.get("face", [])):
        if partner < 0:
            continue
        a, b = found[partner][:n], true[i][:n]
        known = ~np.isnan(a) & ~np.isnan(b)
        if known.sum() > 2 and b[known].std() > 1e-9:
            r = float(np.corrcoef(a[known], b[known])[0, 1]) if a[known].std() > 1e-9 else 0.0
            values.append((r, np.where(known, a, np.nan)))
    if not values:
        raise NotMeasured("no mouth moves in the true video, or none was found in both")
    return over_people(values)


def _expressions(evidence: Evidence) -> list[tuple[FloatArray, FloatArray, npt.NDArray[np.int64]]]:
    """For each person expressions [m, d] of the video and of the truth, and which frames [m] they are of."""
    n, out = evidence.frames, []
    found, true = evidence.found.expressions, evidence.found_in_truth.expressions
    for i, partner in enumerate(evidence.partners.get("face", [])):
        if partner < 0:
            continue
        a, b = found[partner][:n], true[i][:n]
        known = np.nonzero(~np.isnan(a[:, 0]) & ~np.isnan(b[:, 0]))[0]
        if len(known):
            out.append((a[known], b[known], known.astype(np.int64)))
    if not out:
        raise NotMeasured("no face was found in both videos")
    return out


def _expression_error(evidence: Evidence, region: str) -> Value:
    """Mean distance of points of the face, once place, size and turn of the head are taken out."""
    values = []
    for gen, truth, frames in _expressions(evidence):
        dims = 3 if gen.shape[1] % 3 == 0 else 1
        gaps = np.linalg.norm((gen - truth).reshape(len(gen), -1, dims), axis=-1).mean(1)
        curve = np.full(evidence.frames, np.nan)
        curve[frames] = gaps
        values.append((float(gaps.mean()), curve))
    return over_people(values)


def _expression_set(evidence: Evidence, region: str) -> tuple[FloatArray, FloatArray]:
    """Geometry of the face at fewer points: brows, eyes, mouth, which is what expressions are made of."""
    pairs = _expressions(evidence)
    gen = np.concatenate([_reduced(one) for one, _, _ in pairs])
    return gen, np.concatenate([_reduced(true) for _, true, _ in pairs])


MOVING = (13, 14, 61, 291, 0, 17, 78, 308, 159, 145, 386, 374, 105, 334, 107, 336, 70, 300, 152, 205, 425)


def _reduced(expressions: FloatArray) -> FloatArray:
    if expressions.shape[1] != 468 * 3:
        return expressions
    picked: FloatArray = expressions.reshape(-1, 468, 3)[:, MOVING].reshape(len(expressions), -1)
    return picked


def _people(evidence: Evidence, region: str) -> Value:
    return Value(float(evidence.found.people))


METRICS = [
    Metric(
        name="csim",
        title="CSIM",
        about="cosine of identity embeddings of a face and of the true face",
        better="higher",
        regions=FACE,
        slot="identity",
        truth=True,
        measure=alike("identity", IDENTITY_FRAMES),
        perfect=1.0,
    ),
    Metric(
        name="efid",
        title="E-FID",
        about="Frechet distance between the expressions of all videos and the true ones: 21 points of the face mesh",
        better="lower",
        regions=FACE,
        method="mesh",
        truth=True,
        collect=_expression_set,
        least=EXPRESSION_SAMPLES,
        perfect=0.0,
    ),
    Metric(
        name="expression_error",
        title="expression error",
        about="mean distance of the mesh's points from the true ones without the head's pose, in distances of the eyes",
        better="lower",
        regions=FACE,
        method="mesh",
        truth=True,
        measure=_expression_error,
        perfect=0.0,
    ),
    Metric(
        name="expression_similarity",
        title="expression similarity",
        about="cosine of a network's expression features with the true face's",
        better="higher",
        regions=FACE,
        slot="expression",
        truth=True,
        measure=alike("expression"),
        perfect=1.0,
    ),
    Metric(
        name="mouth_r",
        title="mouth r",
        about="correlation of the mouth's opening with the true one",
        better="higher",
        regions=FACE,
        method="mesh",
        truth=True,
        measure=_mouth_r,
        perfect=1.0,
    ),
    Metric(
        name="sync_r",
        title="sync r",
        about="correlation of the mouth's opening with the loudness of the sound, unshifted; not Sync-C",
        better="higher",
        regions=FACE,
        method="mesh-loudness",
        measure=_sync_r,
    ),
    Metric(
        name="sync_offset",
        title="sync offset",
        about="milliseconds by which the mouth is late against the loudness of the sound",
        better="neither",
        regions=FACE,
        method="mesh-loudness",
        measure=_sync_offset,
    ),
    Metric(
        name="sync_error",
        title="sync error",
        about="milliseconds between mouth and sound, late or early",
        better="lower",
        regions=FACE,
        method="mesh-loudness",
        measure=_sync_error,
    ),
    Metric(
        name="people",
        title="people",
        about="median number of faces in the frames that have one",
        better="neither",
        regions=FACE,
        measure=_people,
    ),
]
