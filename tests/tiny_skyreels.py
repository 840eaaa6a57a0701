# SPDX-License-Identifier: Apache-2.0
"""Whole SkyReels-Audio checkpoints with random weights, and small videos to edit."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_i2v import make_i2v

from talkingdit.media.files import VideoWriter

AUDIO_DIM = 12


def make_whisper_folder(folder: Path) -> Path:
    """audio_encoder/: a Whisper model of a few numbers."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    config = WhisperConfig(
        d_model=AUDIO_DIM, encoder_layers=1, encoder_attention_heads=2, decoder_layers=1, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=50, num_mel_bins=80, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WhisperModel(config).eval().save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def make_skyreels(folder: Path, **settings: Any) -> Path:
    """Write a whole checkpoint; returns the folder."""
    chosen = {"chunk_latents": 3, "overlap": 1, "guidance": 1.0, "audio_guidance": 2.0} | settings
    make_i2v(
        folder,
        "skyreels_audio_tiny",
        settings=chosen,
        audio_dim=AUDIO_DIM,
        audio_inject_layers=(0, 1),
    )
    shutil.rmtree(folder / "audio_encoder")
    make_whisper_folder(folder / "audio_encoder")
    return folder


def scene(count: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """Frames of a smooth picture that moves a little, uint8 [count, H, W, 3]."""
    y, x = np.mgrid[: size[0], : size[1]]
    frames = [
        np.stack([128 + 90 * np.sin(x / 9 + t / 4), 128 + 90 * np.cos(y / 7 - t / 5), 100 + x + y / 2], -1)
        for t in range(count)
    ]
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def write_scene(path: Path, count: int, rate: Fraction = Fraction(30000, 1001), crf: int = 6) -> Path:
    frames = scene(count)
    with VideoWriter(path, rate, frames.shape[1:3], crf=crf) as writer:
        writer.write(frames)
    return path
