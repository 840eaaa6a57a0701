# SPDX-License-Identifier: Apache-2.0
"""Flow matching by hand: the path, its velocity, and which noise levels are practised."""

from dataclasses import replace

import pytest
import torch

from training.losses import add_noise, facial_gate, joint_weights, sample_sigmas, velocity_loss
from training.sections import ObjectiveConfig
from training.weighting import level_weight


def test_following_the_velocity_from_noise_arrives_at_the_data():
    clean, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    sigma = torch.tensor([0.25, 0.9])
    x = add_noise(clean, noise, sigma)
    velocity = noise - clean
    torch.testing.assert_close(x - sigma.view(-1, 1, 1, 1, 1) * velocity, clean)


def test_only_the_right_velocity_has_no_loss_and_weights_count_cells():
    clean, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    weight = torch.zeros(2, 1, 3, 4, 4)
    weight[..., 1, 2] = 16.0  # one cell of sixteen: mean weight one
    assert velocity_loss(noise - clean, clean, noise, weight).abs().max() < 1e-6
    wrong = noise - clean
    wrong[..., 0, 0] += 100
    assert velocity_loss(wrong, clean, noise, weight).abs().max() < 1e-6
    wrong[..., 1, 2] += 2
    torch.testing.assert_close(velocity_loss(wrong, clean, noise, weight), torch.full((2,), 4.0))


def test_shift_practises_noisier_levels_with_the_stated_median():
    generator = torch.Generator().manual_seed(0)
    plain = sample_sigmas(20_000, 1.0, generator)
    shifted = sample_sigmas(20_000, 3.0, generator)
    assert shifted.min() > 0
    assert shifted.max() < 1
    assert abs(plain.median() - 0.5) < 0.01
    assert abs(shifted.median() - 0.75) < 0.01  # 3 * 0.5 / (1 + 2 * 0.5)


UNIFORM = ObjectiveConfig(levels="uniform", shift=1.0)


def weights_of(sigmas, **changes):
    objective = replace(UNIFORM, **changes)
    return torch.tensor([level_weight(float(sigma), objective) for sigma in sigmas], dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_the_bell_is_that_of_diffsynth(shift):
    """Its table for training: 1000 levels, evenly and then shifted; weights by the level, least one zero, mean one."""
    even = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    timesteps = 1000 * shift * even / (1 + (shift - 1) * even)
    bell = torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    table = (bell - bell.min()) * (1000 / (bell - bell.min()).sum())
    torch.testing.assert_close(
        weights_of(timesteps[::37] / 1000, weighting="bell", shift=shift), table[::37], rtol=1e-3, atol=1e-3
    )


def test_half_a_bell_is_that_of_ai_toolkit():
    place = torch.arange(1000, dtype=torch.float64)
    bell = torch.exp(-2 * ((place - 500) / 1000) ** 2)
    table = (bell - bell.min()) / (bell - bell.min()).sum() * 1000
    table[500:] = table[500:].max()
    got = weights_of(1 - place[::37] / 999, weighting="half_bell")  # timesteps fall with the place
    torch.testing.assert_close(got / got[-1], table[::37] / table[-1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["cosmap", "sigma_sqrt"])
def test_weights_by_level_are_those_of_diffusers_up_to_their_mean(name):
    training_utils = pytest.importorskip("diffusers.training_utils")
    sigmas = torch.linspace(0.001, 1, 200, dtype=torch.float64)
    theirs = training_utils.compute_loss_weighting_for_sd3(name, sigmas).double()
    got = weights_of(sigmas, weighting=name)
    torch.testing.assert_close(got / got[-1], theirs / theirs[-1], rtol=1e-6, atol=0)
    if name == "cosmap":  # whose mean over all levels is one already
        torch.testing.assert_close(got, theirs, rtol=1e-6, atol=0)


def test_min_snr_weighs_the_error_of_the_clean_latents():
    """Of two velocities the errors of x0 = x - sigma v, weighted by min(snr, gamma), are our weighted errors of v."""
    clean, noise, wrong = (torch.randn(64, dtype=torch.float64) for _ in range(3))
    sigmas = torch.tensor([0.05, 0.2, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)
    wanted, plain = [], []
    for sigma in sigmas:
        x = (1 - sigma) * clean + sigma * noise
        snr = ((1 - sigma) / sigma) ** 2
        wanted.append(min(float(snr), 5.0) * float(((x - sigma * wrong - clean) ** 2).mean()))
        plain.append(float((wrong - (noise - clean)).square().mean()))
    found = weights_of(sigmas, weighting="min_snr") * torch.tensor(plain, dtype=torch.float64)
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found / found[3], wanted / wanted[3], rtol=1e-9, atol=0)


def test_a_weight_by_the_density_is_a_draw_from_it():
    """Levels drawn evenly and weighted by a logit-normal's density give the means of levels drawn from it."""
    sigmas = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    weights = weights_of(sigmas[::10], weighting="logit_normal", weighting_mean=0.5, weighting_std=0.8)
    drawn = sample_sigmas(200_000, 1.0, torch.Generator().manual_seed(0), "logit_normal", 0.5, 0.8).double()
    for power in (1, 2, 3):
        assert (weights * sigmas[::10] ** power).mean() == pytest.approx(float((drawn**power).mean()), rel=5e-3)


@pytest.mark.parametrize("levels", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("name", ["bell", "half_bell", "logit_normal", "cosmap", "min_snr"])
def test_the_mean_weight_of_what_is_drawn_is_one(levels, name):
    o = ObjectiveConfig(levels=levels, shift=3.0, weighting=name)
    drawn = sample_sigmas(4000, o.shift, torch.Generator().manual_seed(0), levels, o.mean, o.std, o.mode_scale)
    mean = sum(level_weight(float(sigma), o) for sigma in drawn) / len(drawn)
    assert mean == pytest.approx(1, abs=0.06)


def test_the_joint_loss_is_equation_2_and_the_gate_leaves_the_lips():
    g = torch.Generator().manual_seed(0)
    prediction, clean, noise = (torch.randn(2, 3, 4, 5, 6, generator=g) for _ in range(3))
    edited, lips = (torch.rand(2, 1, 4, 5, 6, generator=g) for _ in range(2))
    loss = velocity_loss(prediction, clean, noise, joint_weights(edited, 3.0, 0.5))
    error = (prediction.double() - (noise.double() - clean.double())) ** 2
    v = edited.double()
    wanted = (3.0 * v * error + 0.5 * (1 - v) * error).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)

    plain = torch.ones_like(edited)
    closed = velocity_loss(prediction, clean, noise, facial_gate(plain, lips, True))
    torch.testing.assert_close(closed.double(), (lips.double() * error).mean(dim=(1, 2, 3, 4)), rtol=1e-6, atol=0)
    assert facial_gate(plain, lips, False) is plain
    assert facial_gate(plain, None, True) is plain
