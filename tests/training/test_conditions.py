# SPDX-License-Identifier: Apache-2.0
"""What samples are given, counted over many draws: shares, dropout, anchors and curricula of every configuration."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from talkingdit.data.sample import Sample, Shape
from training.conditions import CONDITIONS, AnchorFrame, cell_weights, draw, noisy_history, normal
from training.config import Config, read_toml
from training.loader import Loader
from training.losses import sample_sigmas
from training.sections import at

CONFIGS = {file.stem: file for file in sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))}
STAGES = [(name, i) for name, file in CONFIGS.items() for i in range(len(read_toml(file).stages))]
N = 600
VIEWS = ("front", "back", "left", "right")
FACES = ("surprise", "angry", "disgust", "fear", "contempt", "neutral", "happy", "sad")
# Gloria, tables 5 and 6, in percent.
VIEW_RATIOS = dict(zip(VIEWS, (29.6, 17.3, 27.9, 25.2), strict=True))
FACE_RATIOS = dict(zip(FACES, (15.0, 8.2, 13.7, 10.1, 13.6, 8.1, 14.6, 16.7), strict=True))


def full_sample(frames=6, **changes):
    """A sample that has everything; of some outside frames it has many, of some few."""
    g = torch.Generator().manual_seed(0)
    shapes = {
        "latents": (2, frames, 4, 4),
        "reference": (2, 1, 4, 4),
        "history": (2, 3, 4, 4),
        "pose": (2, frames, 4, 4),
    }
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    outside = {kind: torch.zeros(2, 1 + 9 * i, 4, 4) for i, kind in enumerate(("global", *VIEWS, *FACES))}
    audio = torch.randn(2, 3, 4 * frames, generator=g)
    made = Sample("k", "s", audio=audio, caption="a person", outside=outside, **tensors)
    return dataclasses.replace(made, **changes)


def stage_of(**sections):
    """The stage of the default configuration with changed keys: conditions={"prefix": 1.0}."""
    config = Config(stage_tables=[sections])
    return config.stages[0]


def near(count, n, p):
    """Is a count of n draws of probability p plausible (4.5 standard deviations)?"""
    return abs(count - n * p) <= 4.5 * math.sqrt(n * p * (1 - p)) + 1e-9


@pytest.mark.parametrize(("name", "index"), STAGES)
def test_every_stage_drops_conditions_as_often_as_it_says(name, index):
    stage = read_toml(CONFIGS[name]).stages[index]
    for progress in (0.0, 1.0) if has_ramps(stage) else (0.0,):
        check_rates(stage, [draw(full_sample(), number, stage, 3, progress) for number in range(N)], progress)


def has_ramps(stage):
    sections = (stage.conditions, stage.objective, *stage.conditions.joint)
    values = [value for section in sections for value in vars(section).values()]
    return any(
        isinstance(v, tuple) for value in values for v in (value.values() if isinstance(value, dict) else [value])
    )


def check_rates(stage, draws, progress):
    c = stage.conditions
    for condition in CONDITIONS:
        stays = 1 - at(getattr(c, f"drop_{condition}"), progress)
        for joint in c.joint:
            if condition in joint.conditions:
                stays *= 1 - at(joint.probability, progress)
        kept = sum(condition in d.kept for d in draws)
        assert near(kept, N, stays), (condition, kept / N, stays)
    assert near(sum(d.prefix > 0 for d in draws), N, at(c.prefix, progress))
    assert near(sum(d.weighted for d in draws), N, at(stage.objective.region_share, progress))
    shares = {task: at(share, progress) for task, share in c.tasks.items()} or {"generate": 1.0}
    for task, share in shares.items():
        assert near(sum(d.task == task for d in draws), N, share / sum(shares.values()))


def test_text_and_audio_go_together_besides_alone():
    joint = [{"conditions": ["text", "audio"], "probability": 0.2}]
    stage = stage_of(conditions={"drop_text": 0.1, "drop_audio": 0.3, "joint": joint})
    gone = Counter(frozenset({"text", "audio"} - draw(full_sample(), n, stage, 0).kept) for n in range(N))
    assert near(gone[frozenset()], N, 0.8 * 0.9 * 0.7)
    assert near(gone[frozenset({"text"})], N, 0.8 * 0.1 * 0.7)
    assert near(gone[frozenset({"audio"})], N, 0.8 * 0.9 * 0.3)
    assert near(gone[frozenset({"text", "audio"})], N, 0.2 + 0.8 * 0.1 * 0.3)


def test_one_probability_can_change_without_moving_the_other_draws():
    plain, other = stage_of(), stage_of(conditions={"drop_text": 1.0, "prefix": 0.5}, objective={"region_share": 0.0})
    for number in range(50):
        a, b = draw(full_sample(), number, plain, 7), draw(full_sample(), number, other, 7)
        assert (a.sigma, a.history_noise, a.kept - {"text"}) == (b.sigma, b.history_noise, b.kept)


def test_draws_follow_from_seed_and_number_alone():
    stage = stage_of()
    forwards = [draw(full_sample(), n, stage, 1) for n in range(20)]
    torch.manual_seed(99)
    backwards = [draw(full_sample(), n, stage, 1) for n in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert len({d.sigma for d in forwards}) == 20
    assert draw(full_sample(), 0, stage, 2).sigma != forwards[0].sigma
    assert torch.equal(normal(1, 5, "noise", (4, 5)), normal(1, 5, "noise", (4, 5)))
    assert not torch.equal(normal(1, 5, "noise", (4, 5)), normal(1, 6, "noise", (4, 5)))


def test_a_sample_keeps_only_what_it_has():
    image = Sample("k", "image", latents=torch.zeros(2, 1, 4, 4), kind="image")
    stage = stage_of(conditions={**{f"drop_{c}": 0.0 for c in CONDITIONS}, "prefix": 1.0, "prefix_latents": 1})
    drawn = draw(image, 0, stage, 0)
    assert drawn.kept == frozenset()
    assert drawn.prefix == 0  # an image that is given whole would have nothing to learn from
    assert draw(full_sample(), 0, stage, 0).kept == frozenset(CONDITIONS)


def test_gloria_gives_one_type_of_anchor_with_kinds_by_the_papers_ratios_and_always_the_global_one():
    stages = {stage.name: stage for stage in read_toml(CONFIGS["gloria"]).stages}
    sample = full_sample()
    assert draw(sample, 0, stages["audio"], 0).anchors == ()
    assert {a.kind for n in range(30) for a in draw(sample, n, stages["global_anchor"], 0).anchors} == {"global"}

    drawn = [draw(sample, n, stages["single_type"], 0).anchors for n in range(N)]
    sets = Counter(frozenset(a.type for a in anchors) for anchors in drawn)
    assert set(sets) == {frozenset({"global", "viewpoint"}), frozenset({"global", "expression"})}
    assert near(sets[frozenset({"global", "viewpoint"})], N, 0.5)
    for ratios, own in ((VIEW_RATIOS, "viewpoint"), (FACE_RATIOS, "expression")):
        of_type = [[a for a in anchors if a.type == own] for anchors in drawn]
        of_type = [anchors for anchors in of_type if anchors]
        sizes = Counter(len(anchors) for anchors in of_type)
        assert set(sizes) == set(range(1, len(ratios) + 1))
        assert all(len({a.kind for a in anchors}) == len(anchors) for anchors in of_type)
    assert all(0 <= a.index < sample.outside[a.kind].shape[1] for anchors in drawn for a in anchors)

    both = draw(sample, 0, stages["both_types"], 0).anchors
    assert {a.type for a in both} == {"global", "viewpoint", "expression"}

    for name in ("single_type", "both_types"):
        anchors = stages[name].conditions.anchors
        assert anchors.weights == VIEW_RATIOS | FACE_RATIOS
        one = dataclasses.replace(anchors, most={"viewpoint": 1, "expression": 1})
        stage = dataclasses.replace(stages[name], conditions=dataclasses.replace(stages[name].conditions, anchors=one))
        for ratios, own in ((VIEW_RATIOS, "viewpoint"), (FACE_RATIOS, "expression")):
            kinds = Counter(a.kind for n in range(4 * N) for a in draw(sample, n, stage, 0).anchors if a.type == own)
            for kind, ratio in ratios.items():
                assert near(kinds[kind], kinds.total(), ratio / sum(ratios.values())), (name, kind, kinds)


def test_anchors_are_balanced_by_weights_and_come_from_what_is_there():
    types = {"view": ["front", "back"], "face": ["happy"]}
    anchors = {"types": types, "most": {"view": 1}, "weights": {"front": 3.0}, "probability": 0.5}
    stage = stage_of(conditions={"anchors": anchors})
    sample = full_sample(outside={"front": torch.zeros(2, 2, 4, 4), "back": torch.zeros(2, 5, 4, 4)})
    drawn = [draw(sample, n, stage, 0).anchors for n in range(N)]
    given = [anchors for anchors in drawn if anchors]
    assert near(len(given), N, 0.5)
    assert near(sum(anchors[0].kind == "front" for anchors in given), len(given), 0.75)
    assert all(len(anchors) == 1 for anchors in given)
    assert draw(
        full_sample(outside={"happy": torch.zeros(2, 1, 4, 4)}),
        3,
        stage_of(conditions={"anchors": {"types": types}}),
        0,
    ).anchors == (AnchorFrame("face", "happy", 0),)


def test_hunyuan_avatar_mixes_audio_and_images_one_to_one_and_a_half():
    audio, mixed = read_toml(CONFIGS["hunyuan_avatar"]).stages
    assert (audio.mix, mixed.mix) == ({"audio": 1.0}, {"audio": 1.0, "image": 1.5})
    assert mixed.batch.count * mixed.batch.size == 40
    sigmas = torch.tensor([draw(full_sample(), n, mixed, 0).sigma for n in range(N)])
    logits = torch.logit(sigmas)
    assert abs(logits.mean()) < 4.5 / math.sqrt(N)
    assert abs(logits.std() - 1) < 4.5 / math.sqrt(2 * N)


def test_skyreels_curricula_go_in_a_straight_line_from_their_start_to_their_end():
    joint = read_toml(CONFIGS["skyreels_audio"]).stages[1]
    for progress, share in ((0.0, 0.0), (0.5, 0.25), (1.0, 0.5)):
        edits = sum(draw(full_sample(), n, joint, 0, progress).task == "edit" for n in range(N))
        assert near(edits, N, share)


def test_history_noise_has_the_drawn_level_and_its_levels_are_even_up_to_the_largest():
    stage = stage_of(conditions={"history_noise": [0.0, 0.4], "drop_history": 0.0})
    sample = full_sample(history=torch.zeros(2, 30, 16, 16))
    drawn = [draw(sample, n, stage, 0, progress=1.0) for n in range(N)]
    levels = torch.tensor([d.history_noise for d in drawn])
    assert levels.max() <= 0.4
    assert near(int((levels < 0.1).sum()), N, 0.25)
    history = noisy_history(sample, drawn[0], 0)
    assert abs(history.std() / drawn[0].history_noise - 1) < 0.03
    assert noisy_history(sample, draw(sample, 0, stage, 0, progress=0.0), 0) is sample.history
    dropped = draw(sample, 0, stage_of(conditions={"drop_history": 1.0}), 0)
    assert noisy_history(sample, dropped, 0) is None


def regions():
    face, lips = torch.zeros(6, 4, 4), torch.zeros(6, 4, 4)
    face[:, 1:, 1:] = 1
    lips[:, 3, 2] = 0.5
    return {"face": face, "lips": lips}


def test_regions_are_painted_in_order_and_the_mean_weight_stays_one():
    sample = full_sample(regions=regions())
    stage = stage_of(objective={"regions": {"face": 3.0, "lips": 9.0, "hands": 5.0}, "background": 0.5})
    drawn = dataclasses.replace(draw(sample, 0, stage, 0), prefix=2)
    weight = cell_weights(sample, stage, drawn)
    assert weight.mean().item() == pytest.approx(1, abs=1e-6)
    assert weight[:2].abs().max() == 0  # given clean
    unit = weight[3, 0, 0] / 0.5
    assert (weight[3, 1, 1] / unit).item() == pytest.approx(3)
    assert (weight[3, 3, 2] / unit).item() == pytest.approx(6)  # half of lips over face
    plain = cell_weights(sample, stage, dataclasses.replace(drawn, weighted=False))
    assert torch.equal(plain[2:], torch.full((4, 4, 4), 1.5))


def test_only_lips_count_or_everything_where_there_are_no_lips():
    alignment = read_toml(CONFIGS["skyreels_audio"]).stages[0]
    sample = full_sample(regions=regions())
    chosen = next(d for d in (draw(sample, n, alignment, 0) for n in range(50)) if d.weighted)
    weight = cell_weights(sample, alignment, chosen)
    assert (weight > 0).sum() == 6
    assert weight.mean().item() == pytest.approx(1)
    assert torch.equal(cell_weights(full_sample(), alignment, chosen), torch.ones(6, 4, 4))


def test_the_gate_closes_as_often_as_it_says_over_any_weights():
    objective = {"regions": {"face": 2.0}, "gate_region": "lips", "gate": 0.3}
    stage, sample = stage_of(objective=objective), full_sample(regions=regions())
    drawn = [draw(sample, number, stage, 5) for number in range(N)]
    assert near(sum(d.gated for d in drawn), N, 0.3)
    for gated in (True, False):
        weight = cell_weights(sample, stage, next(d for d in drawn if d.gated is gated))
        assert ((weight > 0) == (sample.regions["lips"] > 0)).all() == gated
        assert weight.mean().item() == pytest.approx(1)
    assert not any(draw(sample, n, stage_of(objective={"gate": 1.0}), 5).gated for n in range(9))


@pytest.mark.parametrize(
    ("levels", "cdf"),
    [
        ("uniform", lambda s: s),
        ("logit_normal", lambda s: 0.5 * (1 + math.erf(math.log(s / (1 - s)) / math.sqrt(2)))),
    ],
)
def test_noise_levels_have_their_distribution(levels, cdf):
    sigma = sample_sigmas(20_000, 1.0, torch.Generator().manual_seed(0), levels)
    for s in (0.1, 0.3, 0.5, 0.8):
        assert near(int((sigma < s).sum()), 20_000, cdf(s))


def test_mode_levels_prefer_the_middle_or_the_ends_and_never_leave_the_range():
    middle, ends = (
        sample_sigmas(20_000, 1.0, torch.Generator().manual_seed(0), "mode", mode_scale=s) for s in (1.29, -0.9)
    )
    assert ((middle - 0.5).abs() < 0.25).float().mean() > 0.55
    assert ((ends - 0.5).abs() < 0.25).float().mean() < 0.45
    assert all(s.min() >= 0 and s.max() <= 1 for s in (middle, ends))
    # The level falls with u; that of u = 0.25 is 0.75 - 1.29 (cos(pi / 8)^2 - 0.75).
    assert near(int((middle > 0.616416).sum()), 20_000, 0.25)
    with pytest.raises(ValueError, match=r"mode_scale must be -1 to 1\.752"):
        sample_sigmas(1, 1.0, None, "mode", mode_scale=2.0)
    with pytest.raises(ValueError, match="levels must be 'logit_normal', 'uniform' or 'mode', got 'cosine'"):
        sample_sigmas(1, 1.0, None, "cosine")


class Clips:
    """A source of tiny clips of one kind."""

    def __init__(self, name, kind, frames):
        self.name, self.kind, self.frames = name, kind, frames

    def __len__(self):
        return 50

    def shape(self, index):
        return Shape(self.frames, 2, 2, kind=self.kind, reference=False)

    def sample(self, index, rng, clip):
        return Sample(f"{index}", self.name, latents=torch.zeros(1, clip.frames, 2, 2), kind=self.kind)


def steps_of(stage, sources, count):
    """Samples of each step of a stage, read by the loader of the run in micro-batches of one."""
    batch = dataclasses.replace(stage.batch, mode="stack", tokens=0, count=5, size=1, frames=[2, 1], resolutions=[])
    loader = Loader(sources, dataclasses.replace(stage, batch=batch, steps=count), seed=0)
    found = [[sample for batch in next(loader) for sample in batch.samples] for _ in range(count)]
    loader.close()
    return found


def test_the_loader_reads_audio_and_images_one_to_one_and_a_half_and_never_both_in_a_step():
    stage = read_toml(CONFIGS["hunyuan_avatar"]).stages[1]
    sources = {"audio": Clips("audio", "video", 2), "image": Clips("image", "image", 1)}
    steps = steps_of(stage, sources, 50)
    assert {len({sample.kind for sample in step}) for step in steps} == {1}
    counts = Counter(sample.source for step in steps for sample in step)
    assert abs(counts["image"] - 150) <= 5
    assert counts["audio"] + counts["image"] == 250


def test_the_loader_follows_the_curriculum_of_a_mix():
    stage = read_toml(CONFIGS["skyreels_audio"]).stages[0]
    steps = steps_of(stage, {name: Clips(name, "video", 2) for name in ("speech", "synced")}, 80)
    synced = [sum(sample.source == "synced" for sample in step) for step in steps]
    assert sum(synced[:8]) <= 3
    assert abs(sum(synced[-20:]) - 44) <= 3  # shares 0.375 to 0.5, 0.4375 on average, of 100 samples
    assert abs(sum(synced) - 100) <= 3
