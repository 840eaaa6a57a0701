# SPDX-License-Identifier: Apache-2.0
"""What makes the transformers of the Wan models models of diffusers: saving, loading, offloading, casting, adapters."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin

from talkingdit.checkpoints.adapters import refuse_adapters
from talkingdit.families.wan_s2v.trunk import WanTrunk


class WanDiffusersModel(WanTrunk, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """A transformer of a Wan model, as diffusers knows models."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As of diffusers; UserError for a model with adapters, which such a folder has no place for."""
        refuse_adapters(self, save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)
