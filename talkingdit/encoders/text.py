# SPDX-License-Identifier: Apache-2.0
"""What a text encoder gives, and what is asked of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class TextFeatures(NamedTuple):
    """What a text encoder gives."""

    features: Tensor  # [B, L, text_dim], zero behind the end of each text
    mask: Tensor  # bool [B, L], true for the tokens of the text


class TextEncoder(Protocol):
    """What pipelines and training ask of a text encoder."""

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts; the empty prompt is the unconditional text."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the encoder does not know, in order, each once."""

    def left_out_words(self, prompt: str) -> list[str]:
        """Words at the end of a long prompt for which there is no room."""


def cut_warning(encoder: TextEncoder, prompt: str, name: str = "the prompt") -> tuple[str, ...]:
    """A sentence about what of a prompt is cut off, where something is."""
    words = encoder.left_out_words(prompt)
    if not words:
        return ()
    lost = f"its last {len(words)} words are" if len(words) > 1 else "its last word is"
    return (f"{name} is too long for this model: {lost} cut off, from {words[0]!r} on.",)
