# SPDX-License-Identifier: Apache-2.0
"""How alike two frames are, pixel by pixel: PSNR, SSIM (Wang et al. 2004) and the cosine of all pixels."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from talkingdit.errors import UserError

Frame = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]

RANGE = 255.0
K1, K2 = 0.01, 0.03
WINDOW, LEAST_WINDOW = 7, 3


def peak_signal_to_noise(a: Frame, b: Frame) -> float:
    """PSNR in dB of two frames uint8 [H, W, C] of one size; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(RANGE**2 / error))


def cosine(a: Frame, b: Frame) -> float:
    """Cosine of two arrays of one size as vectors; two that are all zero are alike (1), one alone is not (0)."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if not (x.any() and y.any()):
        return float(x.any() == y.any())
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def structural_similarity(a: Frame, b: Frame) -> float:
    """Mean SSIM over pixels and channels of two frames uint8 [H, W, C] of one size.

    The form that scikit-image has by default: a uniform window with covariances over n - 1, and only windows that lie
    wholly inside the frame. The window is 7 wide, or the largest odd number that the shorter side holds.

    Raises:
        UserError: a side of less than 3 pixels.
    """
    shorter = min(a.shape[:2])
    window = min(WINDOW, shorter - (shorter + 1) % 2)
    if window < LEAST_WINDOW:
        raise UserError(f"ssim: a frame needs sides of at least {LEAST_WINDOW} pixels, got {a.shape[1]}x{a.shape[0]}.")
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _windowed_mean(x, window), _windowed_mean(y, window)
    unbiased = window**2 / (window**2 - 1)
    var_x = unbiased * (_windowed_mean(x * x, window) - mean_x**2)
    var_y = unbiased * (_windowed_mean(y * y, window) - mean_y**2)
    shared = unbiased * (_windowed_mean(x * y, window) - mean_x * mean_y)
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    likeness = ((2 * mean_x * mean_y + c1) * (2 * shared + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    edge = window // 2
    return float(likeness[edge : a.shape[0] - edge, edge : a.shape[1] - edge].mean())


def _windowed_mean(values: FloatArray, window: int) -> FloatArray:
    return np.asarray(cv2.blur(values, (window, window)), np.float64).reshape(values.shape)
