# SPDX-License-Identifier: Apache-2.0
"""Flow matching by hand: the path, its velocity, and which noise levels are practised."""

import torch

from training.losses import add_noise, sample_sigmas, velocity_loss


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
