# SPDX-License-Identifier: Apache-2.0
"""What is trained together."""

from __future__ import annotations

from torch import nn

from talkingdit.families.puppet.text import PromptEncoder
from talkingdit.families.wan_s2v.model import WanS2VModel


class Networks(nn.Module):
    """The video transformer and, where prompts are not encoded beforehand, the small prompt encoder.

    It has no forward: training calls the two, each of which is the root of its own sharded parameters.
    """

    def __init__(self, transformer: WanS2VModel, text_encoder: PromptEncoder | None = None) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder
