# SPDX-License-Identifier: Apache-2.0
"""What ranks read: the same samples on any number of ranks and workers, none lost or repeated, broken ones left out."""

import itertools
import json
import math
import multiprocessing
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from talkingdit.data.sample import BrokenSample, ClipRequest, Sample, Shape, flaw
from talkingdit.families.wan_s2v.presets import PRESETS
from talkingdit.families.wan_s2v.sequence import tokens_of
from training.batching import MicroBatch
from training.buckets import patches
from training.config import read_toml
from training.loader import Loader
from training.reading import Parcel
from training.sections import BatchConfig, ConditionsConfig, StageConfig, at


class Numbered:
    """Clips whose latents tell their item and what was drawn with their random numbers."""

    def __init__(self, name, shapes, broken=(), raises=None):
        self.name, self.shapes, self.broken, self.raises = name, shapes, set(broken), raises

    def __len__(self):
        return len(self.shapes)

    def shape(self, index):
        return self.shapes[index]

    def sample(self, index, rng, clip):
        if index in self.broken:
            raise self.raises or BrokenSample(f"{index}", f"{self.name}-{index}.mp4 ends too early")
        latents = torch.full((2, clip.frames, clip.height, clip.width), float(index))
        latents[1] = rng.random()
        return Sample(f"{index}", self.name, latents, regions={"mouth": torch.ones(1)}, kind=self.shapes[index].kind)


def stage(mix, count=4, name="speech", steps=100, first_clip=0.3, **batch):
    batch = {"mode": "stack", "size": 2, "frames": [8], **batch}
    conditions = ConditionsConfig(first_clip=first_clip)
    return StageConfig(name=name, steps=steps, mix=mix, batch=BatchConfig(count=count, **batch), conditions=conditions)


@pytest.fixture
def sources():
    rng = np.random.default_rng(0)
    shapes = [Shape(8, int(2 * h), 12) for h in rng.integers(6, 9, 30)]
    return {"a": Numbered("a", shapes), "b": Numbered("b", shapes[:13])}


def read(sources, plan, steps, ranks=1, state=None, workers=0):
    """Samples of every step, {number: (source, item, random number)}, and the states after each."""
    result, states = [{} for _ in range(steps)], [None] * steps
    for rank in range(ranks):
        loader = Loader(sources, plan, 7, rank, ranks, workers=workers, count_tokens=patches)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        for step in range(steps):
            for batch in next(loader):
                assert len({sample.latents.shape for sample in batch.samples}) == 1 or batch.packed
                for number, sample in zip(batch.numbers, batch.samples, strict=True):
                    assert number not in result[step]
                    item, drawn = sample.latents[0, 0, 0, 0].item(), sample.latents[1, 0, 0, 0].item()
                    result[step][number] = sample.source, item, drawn
            assert states[step] in (None, loader.state_dict())  # the same on every rank
            states[step] = loader.state_dict()
        loader.close()
    return result, states


def items_of(batch):
    """(number, item) of the samples of a micro-batch."""
    items = [sample.latents[0, 0, 0, 0].item() for sample in batch.samples]
    return list(zip(batch.numbers, items, strict=True))


PACK = {"mode": "pack", "tokens": 1200}


@pytest.mark.parametrize("options", [{}, PACK], ids=["stack", "pack"])
def test_any_number_of_ranks_and_workers_reads_the_same_samples(sources, options):
    plan = stage({"a": 1, "b": 2}, **options)
    alone, states = read(sources, plan, 6)
    for ranks, workers in ((2, 0), (4, 0), (1, 2), (2, 2)):
        found, others = read(sources, plan, 6, ranks, workers=workers)
        assert found == alone
        assert others == states
    assert len({drawn for step in alone for _, _, drawn in step.values()}) == sum(map(len, alone))


@pytest.mark.parametrize("options", [{}, PACK], ids=["stack", "pack"])
def test_a_run_goes_on_in_the_middle_of_an_epoch_on_other_ranks_and_workers(sources, options):
    plan = stage({"a": 1, "b": 1}, **options)
    straight, states = read(sources, plan, 8)
    resumed, after = read(sources, plan, 5, ranks=2, state=states[2], workers=1)
    assert resumed == straight[3:]
    assert after == states[3:]


def test_an_epoch_has_every_sample_once(sources):
    plan = stage({"a": 1}, count=5, size=3, kinds="any", mode="pack", tokens=500)
    loader = Loader(sources, plan, 0, count_tokens=patches)
    seen = []
    while len(seen) < 90 + 60:
        seen += [pair for batch in next(loader) for pair in items_of(batch)]
    items = dict(seen)
    assert len(items) == len(seen)  # no number twice
    for epoch in range(3):  # numbers of one source count through its epochs
        assert sorted(items[n] for n in range(30 * epoch, 30 * epoch + 30)) == list(range(30))


def test_what_was_read_ahead_is_not_lost(sources):
    plan = stage({"a": 1}, count=2)
    straight, _ = read(sources, plan, 6)
    loader = Loader(sources, plan, 7, workers=2, prefetch=3)
    first = [sorted(n for batch in next(loader) for n in batch.numbers) for _ in range(2)]
    loader.load_state_dict(loader.state_dict())
    first += [sorted(n for batch in next(loader) for n in batch.numbers) for _ in range(2)]
    loader.close()
    first += [sorted(n for batch in next(loader) for n in batch.numbers) for _ in range(2)]
    loader.close()
    assert first == [sorted(step) for step in straight]


def test_the_next_stage_numbers_on_and_reads_the_rest_of_the_epoch(sources):
    first, states = read(sources, stage({"a": 1}, count=3, size=1), 5)
    second, _ = read(sources, stage({"a": 1, "b": 1}, count=4, size=1, name="film"), 8, state=states[-1])
    numbers = [n for step in first + second for n in step]
    assert sorted(numbers) == list(range(len(numbers)))
    items = [item for step in first + second for source, item, _ in step.values() if source == "a"]
    assert sorted(items[:30]) == list(range(30))


def test_the_mix_moves_from_its_start_to_its_end_over_the_stage(sources):
    plan = stage({"a": (1.0, 0.0), "b": (0.0, 1.0)}, count=10, size=1, steps=20)
    steps, _ = read(sources, plan, 20)
    share = [np.mean([source == "b" for source, _, _ in step.values()]) for step in steps]
    np.testing.assert_allclose(share, np.arange(20) / 20, atol=0.11)
    assert sum(share) == pytest.approx(9.5, abs=0.11)


def test_steps_of_a_single_kind_and_kinds_in_balance():
    kinds = ["view", "face", "face", "face"]
    shapes = [Shape(8, 12, 12, kind=kinds[i % 4]) for i in range(40)]
    plan = stage({"a": 1}, kinds="single", kind_shares={"view": 1, "face": 1})
    loader = Loader({"a": Numbered("a", shapes)}, plan, 0)
    seen = [{sample.kind for batch in next(loader) for sample in batch.samples} for _ in range(20)]
    assert all(len(step) == 1 for step in seen)
    assert seen.count({"view"}) == 10


def test_clips_that_begin_a_video_come_in_their_share_and_in_stacks_of_their_own():
    class Cut(Numbered):
        cuts = True

        def sample(self, index, rng, clip):
            sample = super().sample(index, rng, clip)
            sample.history = torch.ones(2, 19, 12, 12) if clip.history else None
            return sample

    loader = Loader({"a": Cut("a", [Shape(8, 12, 12, history=19)] * 10)}, stage({"a": 1}, first_clip=0.3), 0)
    stacks = [[sample.history is None for sample in b.samples] for _ in range(50) for b in next(loader)]
    assert all(len(set(stack)) == 1 for stack in stacks)
    assert np.mean([stack[0] for stack in stacks]) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("raises", [None, RuntimeError("moov atom not found"), KeyError("audio")])
@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_are_left_out_counted_and_told(sources, raises, workers, caplog):
    whole, _ = read(sources, stage({"a": 1}), 5)
    sources["a"] = Numbered("a", sources["a"].shapes, broken=(3, 4, 5), raises=raises)
    loader = Loader(sources, stage({"a": 1}), 7, workers=workers)
    for step in whole:
        batches = next(loader)
        found = dict(pair for batch in batches if any(batch.weights) for pair in items_of(batch))
        assert found == {n: item for n, (_, item, _) in step.items() if item not in (3, 4, 5)}
    lost = [item for step in whole for _, item, _ in step.values() if item in (3, 4, 5)]
    assert loader.figures["broken"] == loader.broken["a"].count == len(lost) > 0
    reason = "ends too early" if raises is None else str(raises)
    assert reason in loader.broken["a"].reasons[0]
    assert reason in caplog.text
    loader.close()


def test_a_micro_batch_that_is_broken_altogether_has_a_sample_that_does_not_count():
    """Every rank must run every forward, or the others wait for ever in a collective."""
    shapes = [Shape(8, 12, 12)] * 20
    whole, broken = (Numbered("a", shapes, broken=items) for items in ((), range(0, 20, 2)))
    loaders = [Loader({"a": source}, stage({"a": 1}, size=1), 7) for source in (whole, broken)]
    stands_in = 0
    for _ in range(5):
        for expected, batch in zip(*map(next, loaders), strict=True):
            assert batch.numbers == expected.numbers
            assert len(batch.samples) == 1
            good = expected.samples[0].latents[0, 0, 0, 0] % 2 == 1
            assert batch.weights == [float(good)]
            if good:
                assert torch.equal(batch.samples[0].latents, expected.samples[0].latents)
            assert batch.samples[0].latents[0, 0, 0, 0] % 2 == 1
            stands_in += not good
    assert stands_in == 10


def read_beside_a_bad_disk(steps):
    """What a process reads of whose peers the second cannot read every third item."""
    source = Numbered("a", [Shape(8, 12, 12)] * 20, broken=range(0, 20, 3) if dist.get_rank() == 1 else ())
    loader = Loader({"a": source}, stage({"a": 1}, size=1), 7, peers=dist.group.WORLD)
    read = [[(b.numbers, b.weights, [s.latents for s in b.samples]) for b in next(loader)] for _ in range(steps)]
    return read, loader.figures["broken"]


def test_processes_that_share_a_sequence_hold_the_same_samples_whatever_one_of_them_can_read(processes):
    (one, broken), (other, others_broken) = processes(2, read_beside_a_bad_disk, 5)
    assert (broken, others_broken) == (0, 7)
    weights = []
    for mine, yours in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
        assert mine[:2] == yours[:2]
        assert torch.equal(torch.stack(mine[2]), torch.stack(yours[2]))
        weights += mine[1]
    assert (len(weights), sum(weights)) == (20, 13)


def test_pinning_takes_one_allocation_for_a_micro_batch(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory  # what DataLoader calls

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    sample = Sample("0", "a", torch.randn(2, 3, 4, 5), regions={"mouth": torch.ones(3, 4, 5)})
    opened = pin_memory(Parcel.closed(MicroBatch([sample, sample], [0, 1], False), [])).opened()
    assert len(pinned) == 1
    assert torch.equal(opened.samples[1].latents, sample.latents)
    assert torch.equal(opened.samples[1].regions["mouth"], sample.regions["mouth"])


def test_latents_that_are_not_what_was_asked_for_or_not_finite_are_broken(sources):
    class Odd(Numbered):
        def sample(self, index, rng, clip):
            sample = super().sample(index, rng, clip)
            if index == 2:
                sample.latents = sample.latents[:, 1:]
            if index == 3:
                sample.latents[0, 0, 0, 0] = float("nan")
            return sample

    loader = Loader({"a": Odd("a", [Shape(8, 12, 12)] * 8)}, stage({"a": 1}), 0)
    next(loader)
    reasons = sorted(loader.broken["a"].reasons)
    assert reasons == [
        "a[2] (2): latents must be 8 x 12 x 12, got [2, 7, 12, 12]",
        "a[3] (3): latents has values that are not finite (1 of 2304)",
    ]


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["audio", "audio_history", "text", "reference", "history", "pose", "regions.mouth"])
def test_a_feature_that_is_not_finite_is_left_out_and_named(name, number):
    class Odd(Numbered):
        def sample(self, index, rng, clip):
            sample = complete(super().sample(index, rng, clip))
            if index == 3:
                dict(sample.tensors())[name].view(-1)[1] = number
            return sample

    loader = Loader({"a": Odd("a", [Shape(8, 12, 12)] * 8)}, stage({"a": 1}), 0)
    items = [item for batch in next(loader) for _, item in items_of(batch)]
    assert sorted(items) == [0, 1, 2, 4, 5, 6, 7]
    [reason] = loader.broken["a"].reasons
    assert reason.startswith(f"a[3] (clip-3): {name} has values that are not finite (1 of ")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("audio", (2, 5, 31), "[any, any, 32]"),
        ("pose", (2, 7, 12, 12), "[2, 8, 12, 12]"),
        ("reference", (2, 12, 12), "[2, 1, 12, 12]"),
        ("history", (3, 4, 12, 12), "[2, any, 12, 12]"),
        ("text", (5,), "[any, any]"),
    ],
)
def test_features_of_another_clip_are_left_out_and_named(name, shape, expected):
    sample = complete(Numbered("a", [Shape(8, 12, 12)]).sample(0, np.random.default_rng(0), ClipRequest(8, 12, 12)))
    assert flaw(sample) is None
    setattr(sample, name, torch.zeros(shape))
    assert flaw(sample) == f"{name} must be {expected} beside latents [2, 8, 12, 12], got {list(shape)}"


def complete(sample):
    """With every tensor that a sample can have."""
    c, t, h, w = sample.latents.shape
    return replace(
        sample,
        key=f"clip-{sample.key}",
        audio=torch.zeros(2, 5, 4 * t),
        audio_history=torch.zeros(2, 5, 3),
        text=torch.zeros(6, 4),
        reference=torch.zeros(c, 1, h, w),
        history=torch.zeros(c, 4, h, w),
        pose=torch.zeros(c, t, h, w),
        regions={"mouth": torch.zeros(t, h, w)},
    )


def test_data_that_is_mostly_broken_ends_the_run(sources):
    shapes = [Shape(8, 12, 12)] * 1000
    loader = Loader({"a": Numbered("a", shapes, broken=range(300, 1000))}, stage({"a": 1}, count=100), 0)
    with pytest.raises(ValueError, match=r"7\d% of the last \d+ samples are broken; first: .*ends too early"):
        next(loader)
    loader = Loader({"a": Numbered("a", shapes, broken=range(1000))}, stage({"a": 1}), 0)
    with pytest.raises(ValueError, match=r"none of 256 samples of 'a' can be read; first: .*ends too early"):
        next(loader)


def test_samples_that_are_too_short_are_not_drawn(caplog):
    shapes = [Shape(8 if i % 2 else 5, 12, 12) for i in range(10)]
    loader = Loader({"a": Numbered("a", shapes)}, stage({"a": 1}, size=1, count=5), 0)
    assert "5 of 10 samples of a are too short or too large" in caplog.text
    assert sorted(s.latents[0, 0, 0, 0].item() for b in next(loader) for s in b.samples) == [1, 3, 5, 7, 9]
    with pytest.raises(ValueError, match=r"none of the 2 samples of source 'a' is long enough for batch.frames \[8\]"):
        Loader({"a": Numbered("a", [Shape(3, 12, 12)] * 2)}, stage({"a": 1}), 0)


@pytest.mark.parametrize(
    ("plan", "ranks", "message"),
    [
        (stage({"film": 1}), 1, r"stages.speech.mix: no source 'film'; there are a, b"),
        (stage({"a": 1}, count=4), 3, r"stages.speech.batch.count must be a multiple of the 3 data ranks, got 4"),
        (stage({"a": 1}, tokens=900), 1, r"batch.tokens is 900, but nothing was given to count with"),
        (stage({"a": (0.0, 1.0), "b": 1.0}, steps=0), 1, r"it needs `steps` and not only `minutes`; got \(0.0, 1.0\)"),
    ],
)
def test_a_stage_that_cannot_be_read_gets_one_sentence(sources, plan, ranks, message):
    with pytest.raises(ValueError, match=message):
        Loader(sources, plan, 0, 0, ranks)


def test_reading_takes_no_number_from_the_programs_own_generator(sources):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(Loader(sources, stage({"a": 1}), 0))
    assert torch.rand(1) == expected


def test_tensors_of_every_type_and_shape_come_through_a_worker_unchanged():
    tensors = {
        "empty": torch.empty(3, 0, dtype=torch.float64),
        "number": torch.tensor(7),
        "odd": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).half(),
        "turned": torch.randn(4, 6).T,
        "mask": torch.rand(9) > 0.5,
    }

    class Rich(Numbered):
        def sample(self, index, rng, clip):
            sample = super().sample(index, rng, clip)
            sample.regions, sample.text = tensors, tensors["half"]
            return sample

    loader = Loader({"a": Rich("a", [Shape(8, 12, 12)] * 9)}, stage({"a": 1}), 0, workers=1)
    for sample in next(loader)[1].samples:
        assert sample.history is None
        assert torch.equal(sample.text, tensors["half"])
        for name, tensor in tensors.items():
            assert sample.regions[name].dtype == tensor.dtype
            assert torch.equal(sample.regions[name], tensor)
    loader.close()


def workers_left(before, seconds=3):
    """Processes started since, once they had time to end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and (left := set(multiprocessing.active_children()) - before):
        time.sleep(0.02)
    return left


def test_a_signal_to_the_whole_job_does_not_take_the_workers_away(sources):
    """A scheduler signals every process; the main one decides what happens, and reads on until its step is saved."""
    before = set(multiprocessing.active_children())
    loader = Loader(sources, stage({"a": 1}), 0, workers=2, prefetch=1)
    next(loader)
    workers = set(multiprocessing.active_children()) - before
    sender = "import os, sys; [os.kill(int(pid), number) for pid in sys.argv[1:] for number in (15, 2, 10)]"
    subprocess.run([sys.executable, "-c", sender, *[str(worker.pid) for worker in workers]], check=True)
    for _ in range(5):
        assert len(next(loader)) == 4
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()  # the main process's own signal ends them
    assert not workers_left(before)


def test_a_loader_that_nobody_uses_any_more_is_gone_with_its_workers(sources):
    before = set(multiprocessing.active_children())
    loader = Loader(sources, stage({"a": 1}), 0, workers=2, prefetch=1)
    next(loader)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del loader
    assert not workers_left(before)


CONFIGS = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_stage_of_the_shipped_configurations_draws_its_mix_within_its_budget(file):
    config = read_toml(file)
    rng = np.random.default_rng(0)

    def source(name):
        sides = [(int(h), int(w)) for h, w in rng.integers(96, 160, (40, 2))]
        if name == "image":
            return Numbered(name, [Shape(1, h, w, kind="image", reference=False, resizable=True) for h, w in sides])
        return Numbered(name, [Shape(40, h, w, history=19, resizable=True) for h, w in sides])

    sources = {name: source(name) for name in config.data.sources}
    count = partial(tokens_of, PRESETS["wan_s2v_14b"])
    state = None
    for plan in config.stages:
        loader = Loader(sources, plan, 0, clip_latents=config.model.clip_latents, count_tokens=count)
        if state is not None:
            loader.load_state_dict(state)
        drawn = []
        for _ in range(3):
            batches = next(loader)
            drawn += [sample.source for batch in batches for sample in batch.samples]
            for batch in batches:
                tokens = [sample.latents[0].numel() // 4 for sample in batch.samples]
                assert plan.batch.tokens in (0, max(plan.batch.tokens, sum(tokens) if batch.packed else max(tokens)))
            if plan.batch.kinds == "single":
                assert len({sample.kind for batch in batches for sample in batch.samples}) == 1
        start = {name: at(share, 0.0) for name, share in plan.mix.items()}
        for name, share in start.items():
            assert abs(drawn.count(name) / len(drawn) - share / sum(start.values())) < 0.35
        state = loader.state_dict()


@pytest.mark.cuda
def test_micro_batches_come_in_pinned_memory(sources):
    loader = Loader(sources, stage({"a": 1}), 0, pin_memory=True)
    (batch, *_) = next(loader)
    assert batch.samples[0].latents.is_pinned()
    assert batch.samples[0].regions["mouth"].is_pinned()
