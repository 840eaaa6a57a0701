# SPDX-License-Identifier: Apache-2.0
"""What a sample is given to go by: which conditions it keeps, which anchors, how many clean latents, which noise level.

Every draw comes from a generator of its own, seeded with (seed of the run, number of the sample, name of the draw). So
it is the same on any number of processes and after any resume, and one probability can be changed without moving the
other draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from talkingdit.data.sample import Sample
from talkingdit.families.training import GENERATE
from training.losses import facial_gate, joint_weights, sample_sigmas
from training.sections import AnchorsConfig, ConditionsConfig, Ramp, StageConfig, at

CONDITIONS = ("text", "audio", "reference", "history", "pose")


def random(seed: int, number: int, name: str) -> np.random.Generator:
    """The generator of one draw of sample `number`."""
    return np.random.default_rng((seed, number, zlib.crc32(name.encode())))


def normal(seed: int, number: int, name: str, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 numbers on the CPU, the same whatever the device and layout of the run."""
    return torch.randn(tuple(shape), generator=_generator(seed, number, name))


def _generator(seed: int, number: int, name: str) -> torch.Generator:
    state = np.random.SeedSequence((seed, number, zlib.crc32(name.encode()))).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def happens(seed: int, number: int, name: str, probability: float) -> bool:
    """Whether a thing of this probability happens to sample `number`."""
    return probability > 0 and bool(random(seed, number, name).random() < probability)


@dataclass(frozen=True)
class AnchorFrame:
    """One frame of `Sample.outside[kind]`, and the type that the kind belongs to."""

    type: str
    kind: str
    index: int


@dataclass(frozen=True)
class Draws:
    """What was drawn for a sample."""

    number: int
    sigma: float  # noise level, 0..1
    kept: frozenset[str]  # of CONDITIONS: what the sample has and is given
    history_noise: float  # standard deviation of the noise on the history
    prefix: int  # latents at the beginning that are given clean
    weighted: bool  # is the loss weighted by region?
    gated: bool = False  # does the loss count in the gate's region alone?
    task: str = GENERATE
    anchors: tuple[AnchorFrame, ...] = ()


def draw(sample: Sample, number: int, stage: StageConfig, seed: int, progress: float = 0.0) -> Draws:
    """Draw everything that is random about a sample but its noise.

    Args:
        sample: what it has decides what it can keep.
        number: of the sample in the run.
        stage: probabilities; ramps are taken at `progress`, 0..1 of the stage.
        seed: of the run.
    """
    c, o = stage.conditions, stage.objective
    kept = present(sample) - dropped(c, seed, number, progress)
    long_enough = sample.latents.shape[1] > c.prefix_latents
    most = at(c.history_noise, progress) if "history" in kept else 0.0
    generator = _generator(seed, number, "sigma")
    return Draws(
        number=number,
        sigma=float(sample_sigmas(1, o.shift, generator, o.levels, o.mean, o.std, o.mode_scale)),
        kept=frozenset(kept),
        history_noise=most * float(random(seed, number, "history level").random()) if most > 0 else 0.0,
        prefix=c.prefix_latents if long_enough and happens(seed, number, "prefix", at(c.prefix, progress)) else 0,
        weighted=happens(seed, number, "regions", at(o.region_share, progress)),
        gated=bool(o.gate_region) and happens(seed, number, "gate", at(o.gate, progress)),
        task=draw_task(c.tasks, seed, number, progress),
        anchors=draw_anchors(sample, c.anchors, seed, number, progress),
    )


def present(sample: Sample) -> set[str]:
    """The conditions that a sample has; a caption without words is none."""
    has = {name for name in ("audio", "reference", "history", "pose") if getattr(sample, name) is not None}
    if sample.voices:
        has.add("audio")
    if sample.caption.strip() or sample.text is not None:
        has.add("text")
    return has


def dropped(conditions: ConditionsConfig, seed: int, number: int, progress: float) -> set[str]:
    """Names of the conditions that a sample loses: each by itself, and those that go together."""
    gone = {
        name
        for name in CONDITIONS
        if happens(seed, number, f"drop {name}", at(getattr(conditions, f"drop_{name}"), progress))
    }
    for i, joint in enumerate(conditions.joint):
        if happens(seed, number, f"joint {i}", at(joint.probability, progress)):
            gone.update(joint.conditions)
    return gone


def draw_task(tasks: Mapping[str, Ramp], seed: int, number: int, progress: float) -> str:
    """One of the tasks by their shares at `progress`; "generate" where there are none."""
    shares = np.array([at(share, progress) for share in tasks.values()])
    if not shares.sum() > 0:
        return GENERATE
    return str(random(seed, number, "task").choice(list(tasks), p=shares / shares.sum()))


def draw_anchors(
    sample: Sample, config: AnchorsConfig, seed: int, number: int, progress: float
) -> tuple[AnchorFrame, ...]:
    """Frames from all over the video: some of every type in `always`, and of one or all of the others.

    The type is drawn evenly from those that the sample has, then how many (1 to `most`), then that many different
    kinds by their weights (evenly without), then one frame of each. So a kind of which a video shows much is not drawn
    more often than another one.
    """
    if not config.types:
        return ()
    rng = random(seed, number, "anchors")
    there = {kind: _usable(sample, kind, config.of) for kind in sample.outside}
    there = {kind: places for kind, places in there.items() if places}
    types = {name: [kind for kind in kinds if kind in there] for name, kinds in config.types.items()}
    types = {name: kinds for name, kinds in types.items() if kinds}
    chosen = [name for name in types if name in config.always]
    others = [name for name in types if name not in config.always]
    given, single = rng.random(2) < (at(config.probability, progress), at(config.single, progress))
    if others and given:
        chosen += [others[rng.integers(len(others))]] if single else others
    anchors = []
    for name in chosen:
        kinds = types[name]
        weights = np.array([config.weights.get(kind, 1.0) for kind in kinds])
        count = int(rng.integers(1, min(config.most.get(name, len(kinds)), len(kinds)) + 1))
        for i in sorted(rng.choice(len(kinds), count, replace=False, p=weights / weights.sum())):
            places = there[kinds[i]]
            anchors.append(AnchorFrame(name, kinds[i], places[int(rng.integers(len(places)))]))
    return tuple(anchors)


def _usable(sample: Sample, kind: str, of: str) -> list[int]:
    """Which frames of a kind may be drawn. Of a frame that nothing says it of, it is not of the clip."""
    count = sample.outside[kind].shape[1]
    if of == "video":
        return list(range(count))
    return [] if kind not in sample.inside else [int(i) for i in sample.inside[kind].nonzero()]


def noisy_history(sample: Sample, draws: Draws, seed: int) -> Tensor | None:
    """The history that the sample is given, [C, n, H, W], with its noise; None if it has or keeps none."""
    if sample.history is None or "history" not in draws.kept:
        return None
    if draws.history_noise == 0:
        return sample.history
    noise = normal(seed, draws.number, "history noise", sample.history.shape)
    return sample.history + draws.history_noise * noise


def cell_weights(sample: Sample, stage: StageConfig, draws: Draws, progress: float = 0.0) -> Tensor:
    """Weight of every latent cell in the loss, float32 [T, H, W], of mean one.

    Regions are painted on the background in the order of the configuration: where the mask m of a region (0..1) covers
    a cell, its weight goes to (1 - m) weight + m region weight. Latents that are given clean weigh nothing, and the
    others are raised so that the mean stays one. A sample whose weights would all be zero is weighted evenly. Where the
    gate is closed, only its region counts, with the weights that it has there.

    Source: SkyReels-Audio, section 2.3: a factor in the region, another one outside (equation 2), and the facial mask
    loss, gated by a probability.
    """
    o = stage.objective
    weight = torch.ones(sample.latents.shape[1:])
    if draws.weighted and o.regions:
        weight *= at(o.background, progress)
        for name, value in o.regions.items():
            if name in sample.regions:
                weight = joint_weights(sample.regions[name].float(), at(value, progress), weight)
    weight = facial_gate(weight, sample.regions.get(o.gate_region), draws.gated)
    counted = torch.ones_like(weight)
    counted[: draws.prefix] = 0
    weight = weight * counted
    weight = weight if weight.sum() > 0 else counted
    return weight / weight.mean()
