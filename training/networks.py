# SPDX-License-Identifier: Apache-2.0
"""What is trained together."""

from __future__ import annotations

from typing import Any

from torch import nn

from talkingdit.families import Family


class Networks(nn.Module):
    """The video transformer and, where prompts are not encoded beforehand, the text encoder that trains along.

    It has no forward: training calls the two, each of which is the root of its own sharded parameters.

    Args:
        family: whose models they are.
        transformer: a diffusers model.
        text_encoder: its `encode(captions).features` are [n, L, text_dim]; None where samples bring features.
    """

    def __init__(self, family: Family, transformer: Any, text_encoder: Any = None) -> None:
        super().__init__()
        self.family = family
        self.transformer, self.text_encoder = transformer, text_encoder
