# SPDX-License-Identifier: Apache-2.0
"""The small text encoder for drawn scenes as a model of diffusers; what it computes is in text_network.py."""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from talkingdit.families.puppet.text_network import END, PAD, UNKNOWN, WORDS, PromptNetwork

__all__ = ["END", "PAD", "UNKNOWN", "WORDS", "PromptEncoder"]


class PromptEncoder(PromptNetwork, ModelMixin, ConfigMixin):  # type: ignore[misc]
    __doc__ = PromptNetwork.__doc__

    __init__ = register_to_config(PromptNetwork.__init__)
