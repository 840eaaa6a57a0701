# SPDX-License-Identifier: Apache-2.0
"""The network of a small text encoder with a closed vocabulary, for drawn scenes. It needs torch alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkingdit.encoders.text import TextFeatures
from talkingdit.nn.configured import BareModel, configured

PAD, END, UNKNOWN = 0, 1, 2

# fmt: off
WORDS = (
    "<pad>", "<end>", "<unk>",
    # who and how many
    "person", "one", "two", "and",
    # what has a colour, a style or a sign
    "hair", "eyes", "skin", "shirt", "logo", "background",
    # hair styles
    "bald", "short", "long", "bun", "spiky", "curly",
    # clothes
    "dress", "jacket", "coat", "sweater", "hoodie", "suit", "hat", "glasses", "striped",
    # colours
    "black", "white", "grey", "red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "blond",
    "pale", "light", "dark", "tan", "rosy", "olive", "sky", "mint", "sand", "lilac", "mist",
    # signs
    "circle", "square", "triangle", "star", "heart", "cross",
    # expressions
    "neutral", "happy", "sad", "angry", "surprised", "fear", "disgust", "contempt",
    # where from
    "front", "left", "right", "back", "side",
    # what happens
    "talking", "singing", "silent", "still", "moving",
)
# fmt: on

# Words that say nothing a frame shows. They take no token, so that a description fits into few.
GLUE = frozenset(
    ("a", "an", "the", "of", "in", "on", "at", "to", "with", "from", "is", "are", "has", "have", "wears", "wearing")
    + ("his", "her", "their", "view", "facing", "seen")
)

SYNONYMS = {
    "people": "person",
    "character": "person",
    "man": "person",
    "woman": "person",
    "gray": "grey",
    "blonde": "blond",
    "violet": "purple",
    "tshirt": "shirt",
    "t-shirt": "shirt",
    "emblem": "logo",
    "smiling": "happy",
    "afraid": "fear",
    "fearful": "fear",
    "disgusted": "disgust",
    "contemptuous": "contempt",
    "calm": "neutral",
    "speaking": "talking",
    "quiet": "silent",
    "frontal": "front",
    "behind": "back",
    "static": "still",
}


class PromptNetwork(nn.Module):
    """A text encoder for the closed vocabulary in which drawn scenes are described.

    Words are looked up, get a learned place, and see their two neighbours once (a colour belongs to the noun behind
    it). Words it does not know share one embedding; `unknown_words` names them.

    Args:
        text_dim: width of the features.
        text_len: most tokens of a prompt, the one for its end included.
        words: the vocabulary; the first three are padding, end and unknown.
    """

    if TYPE_CHECKING:
        config: Any

    @configured
    def __init__(self, text_dim: int = 64, text_len: int = 36, words: Sequence[str] = WORDS):
        super().__init__()
        self.index = {word: i for i, word in enumerate(words)}
        self.embedding = nn.Embedding(len(words), text_dim)
        self.position = nn.Parameter(torch.randn(text_len, text_dim).mul_(0.02))
        self.norm = nn.LayerNorm(text_dim)
        self.mix = nn.Conv1d(text_dim, text_dim, 3, padding=1)

    def words(self, prompt: str) -> list[str]:
        """The words of a prompt that take a token: lower case, glue left out, synonyms replaced."""
        found = (word for word in re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", prompt.lower()) if word not in GLUE)
        return [SYNONYMS.get(word, word) for word in found]

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the encoder does not know, in order, each once."""
        return list(dict.fromkeys(word for word in self.words(prompt) if word not in self.index))

    def left_out_words(self, prompt: str) -> list[str]:
        """Words at the end of a long prompt for which there is no room."""
        return self.words(prompt)[self.config.text_len - 1 :]

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token numbers [B, text_len]: words (as many as there is room for), the end, padding.

        Raises:
            TypeError: prompts is one string instead of a list of them.
        """
        if isinstance(prompts, str):
            raise TypeError("PromptEncoder: prompts must be a list of strings, got one string")
        length = self.config.text_len
        rows = []
        for prompt in prompts:
            row = [self.index.get(word, UNKNOWN) for word in self.words(prompt)[: length - 1]]
            rows.append([*row, END] + [PAD] * (length - 1 - len(row)))
        return torch.tensor(rows, dtype=torch.long).view(len(rows), length)

    def forward(self, tokens: Tensor) -> TextFeatures:
        """Features of token numbers [B, text_len]."""
        mask = tokens != PAD
        x = (self.embedding(tokens) + self.position) * mask[..., None]
        y = F.gelu(self.mix((self.norm(x) * mask[..., None]).transpose(1, 2)).transpose(1, 2))
        return TextFeatures((x + y) * mask[..., None], mask)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts; the empty prompt, which is only its end, is the unconditional text."""
        return self(self.tokens(prompts).to(self.position.device))


class BarePromptEncoder(PromptNetwork, BareModel):
    """The encoder with nothing around it: to generate, see `talkingdit.nn.configured`."""
