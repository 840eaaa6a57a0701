# SPDX-License-Identifier: Apache-2.0
"""Words for HunyuanVideo-Avatar: features of a prompt with the character's picture, and pooled ones.

    AvatarText     LLaVA and CLIP, as released
    DrawnText      the small prompt encoder of the drawn world
    NoText         a checkpoint without text encoders: features come from a file

A file of features is safetensors with text [L, D], text_mask [L] and pooled [P] of the prompt, and negative_text,
negative_text_mask and negative_pooled of the negative one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from talkingdit.checkpoints.saving import save_tensors
from talkingdit.checkpoints.weights import read_bounded
from talkingdit.errors import UserError

NAMES = ("text", "text_mask", "pooled")


class Words(NamedTuple):
    """What a prompt becomes."""

    features: Tensor  # [1, L, text_states_dim]
    mask: Tensor  # bool [1, L]
    pooled: Tensor  # [1, text_states_dim_2]


class AvatarTextEncoder(Protocol):
    """What the pipeline asks of the text encoders of a checkpoint."""

    @property
    def dims(self) -> tuple[int, int] | None:
        """Widths of the features and of the pooled ones; None where they come from a file."""

    def encode(self, prompt: str, image: NDArray[np.uint8]) -> Words:
        """Features of a prompt with the picture [H, W, 3] of the character."""

    def left_out_words(self, prompt: str) -> list[str]:
        """Words at the end of a long prompt for which there is no room."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the encoder does not know, in order, each once."""


class AvatarText(nn.Module):
    """LLaVA and CLIP, see `talkingdit.encoders.llava`."""

    def __init__(self, llava: Any, clip: Any):
        super().__init__()
        self.llava, self.clip = llava, clip

    @property
    def dims(self) -> tuple[int, int]:
        return self.llava.text_dim, self.clip.text_dim

    def encode(self, prompt: str, image: NDArray[np.uint8]) -> Words:
        found = self.llava.encode(prompt, image)
        return Words(found.features, found.mask, self.clip.encode(prompt))

    def left_out_words(self, prompt: str) -> list[str]:
        return self.llava.left_out_words(prompt)

    def unknown_words(self, prompt: str) -> list[str]:
        return []


class DrawnText(nn.Module):
    """A prompt encoder that looks at no picture; the pooled features are the mean of the others."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder = encoder

    @property
    def dims(self) -> tuple[int, int]:
        return self.encoder.config.text_dim, self.encoder.config.text_dim

    @torch.no_grad()
    def encode(self, prompt: str, image: NDArray[np.uint8]) -> Words:
        features, mask = self.encoder.encode([prompt])
        return Words(features, mask, pooled_mean(features, mask))

    def left_out_words(self, prompt: str) -> list[str]:
        return self.encoder.left_out_words(prompt)

    def unknown_words(self, prompt: str) -> list[str]:
        return self.encoder.unknown_words(prompt)


class NoText(nn.Module):
    """In the place of text encoders that a checkpoint lacks.

    Args:
        folder: of the checkpoint, for messages.
    """

    dims = None

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def encode(self, prompt: str, image: NDArray[np.uint8]) -> Words:
        raise UserError(
            f"{self._folder}: this checkpoint has no text encoders (llava_llama_image/ and text_encoder_2/); give the "
            "features of a prompt with `--text-features`."
        )

    def left_out_words(self, prompt: str) -> list[str]:
        return []

    def unknown_words(self, prompt: str) -> list[str]:
        return []


def pooled_mean(features: Tensor, mask: Tensor) -> Tensor:
    """[B, L, D] and [B, L] -> [B, D], the mean of the real tokens."""
    weight = mask[..., None].to(features.dtype)
    return (features * weight).sum(1) / weight.sum(1).clamp(min=1)


def load_text_encoder(
    folder: Path, text: Path | None, pooled: Path | None, dtype: torch.dtype, device: torch.device | str
) -> AvatarTextEncoder:
    """The text encoders of a checkpoint.

    Args:
        folder: of the checkpoint.
        text, pooled: folders of the two encoders; None where there is none.
        dtype: of the large ones.

    Raises:
        UserError: one of two is missing, or does not load.
    """
    from talkingdit.checkpoints.folder import load_part
    from talkingdit.encoders.llava import load_clip, load_llava

    if text is not None and (text / "config.json").is_file():
        kind = read_bounded(text / "config.json").get("_class_name")
        if kind == "PromptEncoder":
            from talkingdit.families.puppet.text import PromptEncoder

            return DrawnText(load_part(PromptEncoder, text, torch.float32, device))
    if text is None and pooled is None:
        return NoText(folder)
    if text is None or pooled is None:
        raise UserError(
            f"{folder}: not a whole checkpoint, of its two text encoders only {(text or pooled).name}/ is there."  # type: ignore[union-attr]
        )
    return AvatarText(load_llava(text, dtype, device), load_clip(pooled, dtype, device))


def read_words(path: Path) -> tuple[Words, Words]:
    """The features of a prompt and a negative prompt from a file, see above.

    Raises:
        UserError: no such file, or not one of these.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{path}: expected text features as safetensors, got none that can be read ({error})."
        ) from error
    found = []
    for prefix in ("", "negative_"):
        missing = [prefix + name for name in NAMES if prefix + name not in tensors]
        if missing:
            raise UserError(
                f"{path}: expected text features, {missing[0]} is missing among {', '.join(sorted(tensors))}."
            )
        text, mask, pooled = (tensors[prefix + name] for name in NAMES)
        if text.dim() != 2 or mask.shape != text.shape[:1] or pooled.dim() != 1:
            raise UserError(
                f"{path}: expected {prefix}text [L, D], text_mask [L] and pooled [P], "
                f"got {list(text.shape)}, {list(mask.shape)} and {list(pooled.shape)}."
            )
        found.append(Words(text[None].float(), mask[None].bool(), pooled[None].float()))
    return found[0], found[1]


def save_words(path: Path, prompt: Words, negative: Words) -> None:
    """Write a file of features, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for prefix, words in (("", prompt), ("negative_", negative)):
        tensors |= {prefix + name: tensor[0].cpu().contiguous() for name, tensor in zip(NAMES, words, strict=True)}
    save_tensors(tensors, path)


def same_length(one: Words, other: Words) -> tuple[Words, Words]:
    """The shorter one padded, so that both go through the model together."""
    length = max(one.mask.shape[1], other.mask.shape[1])

    def padded(words: Words) -> Words:
        missing = length - words.mask.shape[1]
        features = torch.nn.functional.pad(words.features, (0, 0, 0, missing))
        return Words(features, torch.nn.functional.pad(words.mask, (0, missing)), words.pooled)

    return padded(one), padded(other)
